"""A Megatron-Bridge pre-training script that takes `fp8_recipe=…`, and Bridge's own overrides after `--`.

What this package adds is marked 1 to 3; everything else is plain Megatron-Bridge.

    python examples/pretrain_bridge.py fp8_recipe=delayed                           # no GPU: emulated
    torchrun --nproc-per-node 8 examples/pretrain_bridge.py fp8_recipe=mxfp8 -- train.train_iters=100
"""

from __future__ import annotations

import os
import sys

import nemo_fp8_recipes as fp8
from nemo_fp8_recipes.config import compose

RUN_DIRECTORY = "runs/example-bridge"


def main(overrides: list[str], bridge_overrides: list[str]) -> None:
    # 1. Recipe, preflight and device, before torch, Transformer Engine and Bridge are imported.
    job = fp8.start(compose(overrides))
    print(f"{job.recipe.name} on {job.device.label}")

    import torch
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.training.config import (
        CheckpointConfig,
        ConfigContainer,
        DistributedDataParallelConfig,
        LoggerConfig,
        MockGPTDatasetConfig,
        OptimizerConfig,
        RNGConfig,
        SchedulerConfig,
        TokenizerConfig,
        TrainingConfig,
        ValidationConfig,
    )
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain
    from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides
    from megatron.core.transformer.enums import AttnBackend

    from nemo_fp8_recipes.callbacks.bridge import Fp8Callback, mixed_precision

    on_gpu = not job.device.emulated
    for name, value in {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
        "RANK": "0",
        "WORLD_SIZE": "1",
    }.items():
        os.environ.setdefault(name, value)
    steps = 20
    config = ConfigContainer(
        model=GPTModelProvider(
            num_layers=4,
            hidden_size=256,
            ffn_hidden_size=1024,
            num_attention_heads=8,
            num_query_groups=4,
            seq_length=128,
            vocab_size=256,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
            add_bias_linear=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            # Fused CUDA kernels; the emulated device runs their PyTorch forms.
            attention_backend=AttnBackend.auto if on_gpu else AttnBackend.unfused,
            masked_softmax_fusion=on_gpu,
            bias_dropout_fusion=on_gpu,
            apply_rope_fusion=on_gpu,
            cross_entropy_loss_fusion=on_gpu,
            gradient_accumulation_fusion=False,
        ),
        train=TrainingConfig(train_iters=steps, global_batch_size=4, micro_batch_size=4),
        validation=ValidationConfig(eval_interval=steps, eval_iters=2),
        optimizer=OptimizerConfig(optimizer="adam", lr=1e-3, min_lr=1e-4, use_distributed_optimizer=False),
        scheduler=SchedulerConfig(
            lr_decay_style="cosine",
            lr_decay_iters=steps,
            lr_warmup_iters=2,
            start_weight_decay=0.1,
            end_weight_decay=0.1,
            weight_decay_incr_style="constant",
        ),
        ddp=DistributedDataParallelConfig(use_distributed_optimizer=False),
        dataset=MockGPTDatasetConfig(
            random_seed=1234,
            seq_length=128,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            dataloader_type="single",
            num_workers=0,
        ),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=255),
        logger=LoggerConfig(log_interval=1),
        checkpoint=CheckpointConfig(),
        rng=RNGConfig(seed=1234),
        # 2. The recipe; by its name alone it would be mixed_precision="nemo_fp8_mxfp8".
        mixed_precision=mixed_precision(job.recipe),
    )
    process_config_with_overrides(config, cli_overrides=bridge_overrides)

    # 3. The proof that it arrived, and telemetry.
    callback = Fp8Callback(RUN_DIRECTORY, log_every=5)
    pretrain(config, forward_step, callbacks=[callback])
    if callback.manifest is not None and not torch.distributed.is_initialized():
        from rich.console import Console

        Console().print(callback.manifest.table())
        print(f"the recipe came in by {callback.way}; telemetry: {RUN_DIRECTORY}")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    main(arguments[:split], arguments[split + 1 :])
