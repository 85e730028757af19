"""A Megatron-Core training script that takes `fp8_recipe=…` on its own command line.

What this package adds is marked 1 to 3; everything else is plain Megatron-Core.

    python examples/pretrain_megatron_core.py fp8_recipe=blockwise                    # no GPU: emulated
    torchrun --nproc-per-node 8 examples/pretrain_megatron_core.py fp8_recipe=mxfp8   # a GPU node
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import nemo_fp8_recipes as fp8
from nemo_fp8_recipes.callbacks.megatron_core import Fp8Run
from nemo_fp8_recipes.config import compose

STEPS, MICRO_BATCH = 20, 4
RUN_DIRECTORY = Path("runs/example-megatron-core")


def main(overrides: list[str]) -> None:
    # 1. Recipe, preflight and device, before torch, Transformer Engine and Megatron are imported.
    config = compose(overrides)
    job = fp8.start(config)
    print(f"{job.recipe.name} on {job.device.label}")

    import torch
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    on_gpu = not job.device.emulated
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
    }.items():
        os.environ.setdefault(name, value)
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=config.parallel.tp)
    model_parallel_cuda_manual_seed(1234)

    shape = config.model
    transformer_config = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        add_bias_linear=False,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        tensor_model_parallel_size=config.parallel.tp,
        # Fused CUDA kernels; the emulated device runs their PyTorch forms.
        masked_softmax_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        apply_rope_fusion=on_gpu,
        gradient_accumulation_fusion=False,
        # 2. What the recipe needs Megatron to know; it injects the rest.
        **job.recipe.megatron(),
    )

    # 3. Injection, the proof that it arrived, and telemetry.
    def attach(model: Any) -> Any:
        return fp8.telemetry.attach(model, job.recipe, directory=RUN_DIRECTORY, log_every=5)

    with Fp8Run(job.recipe, telemetry=attach) as run:
        run.check(transformer_config)
        model = GPTModel(
            config=transformer_config,
            transformer_layer_spec=get_gpt_layer_with_transformer_engine_spec(),
            vocab_size=shape.vocab_size,
            max_sequence_length=shape.seq_length,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
        ).to("cuda" if on_gpu else "cpu", dtype=torch.bfloat16)
        wrapped = DistributedDataParallel(transformer_config, DistributedDataParallelConfig(), model)
        optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-3, bf16=True), [wrapped])
        transformer_config.finalize_model_grads_func = finalize_model_grads
        run.model_built(wrapped)

        batches = random_walks(shape.vocab_size, shape.seq_length, next(model.parameters()).device)
        forward_backward = get_forward_backward_func()
        for step in range(1, STEPS + 1):
            run.begin_step(step)
            wrapped.zero_grad_buffer()
            optimizer.zero_grad()
            (losses,) = forward_backward(
                forward_step_func=forward_step,
                data_iterator=batches,
                model=[wrapped],
                num_microbatches=1,
                seq_length=shape.seq_length,
                micro_batch_size=MICRO_BATCH,
                forward_only=False,
            )
            optimizer.step()
            loss = float(losses["loss"])
            run.end_step(step, {"loss": loss})
            print(f"step {step:3d}  loss {loss:.4f}")

    if torch.distributed.get_rank() == 0 and run.manifest is not None:
        from rich.console import Console

        Console().print(run.manifest.table())
        print(f"telemetry: {RUN_DIRECTORY}")
    torch.distributed.destroy_process_group()


def forward_step(batches: Any, model: Any) -> Any:
    """Megatron's forward function: the model's output and how its loss is made."""
    tokens, positions = next(batches)
    output = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:])
    return output, partial(mean_loss)


def mean_loss(per_token: Any) -> Any:
    loss = per_token.float().mean()
    return loss, {"loss": loss.detach()}


def random_walks(vocabulary: int, length: int, device: Any) -> Any:
    """Sequences that can be learnt: each token is at most two away from the one before it."""
    import torch

    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    positions = torch.arange(length, device=device)[None].expand(MICRO_BATCH, -1)
    while True:
        steps = torch.randint(-2, 3, (MICRO_BATCH, length + 1), generator=generator)
        yield (steps.cumsum(1) % vocabulary).to(device), positions


if __name__ == "__main__":
    main(sys.argv[1:])
