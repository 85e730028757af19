"""A NeMo 2 pre-training script that takes `fp8_recipe=…` on its own command line.

What this package adds is marked 1 and 2; everything else is plain NeMo.

    python examples/pretrain_nemo.py fp8_recipe=blockwise                    # no GPU: emulated
    torchrun --nproc-per-node 8 examples/pretrain_nemo.py fp8_recipe=mxfp8   # a GPU node
"""

from __future__ import annotations

import os
import sys
from typing import Any

import nemo_fp8_recipes as fp8
from nemo_fp8_recipes.config import compose

STEPS, MICRO_BATCH = 10, 2
RUN_DIRECTORY = "runs/example-nemo"


def main(overrides: list[str]) -> None:
    # 1. Recipe, preflight and device, before torch, Transformer Engine and NeMo are imported.
    config = compose(overrides)
    job = fp8.start(config)
    print(f"{job.recipe.name} on {job.device.label}")

    import nemo.lightning as nl
    from megatron.core.optimizer import OptimizerConfig
    from nemo.collections import llm

    from nemo_fp8_recipes.callbacks.nemo import Fp8RecipeCallback, precision_plugin

    shape, processes = config.model, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    model = llm.NemotronModel(
        llm.Nemotron3Config4B(
            num_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            ffn_hidden_size=shape.ffn_hidden_size,
            num_attention_heads=shape.num_attention_heads,
            num_query_groups=shape.num_query_groups,
            kv_channels=None,
            seq_length=shape.seq_length,
        ),
        tokenizer=Bytes(),
    )
    data = llm.MockDataModule(
        seq_length=shape.seq_length,
        micro_batch_size=MICRO_BATCH,
        global_batch_size=MICRO_BATCH * processes,
        tokenizer=Bytes(),
        num_workers=0,
    )
    trainer = nl.Trainer(
        accelerator="gpu",
        devices=processes,
        max_steps=STEPS,
        strategy=nl.MegatronStrategy(tensor_model_parallel_size=config.parallel.tp),
        # 2. The recipe: what NeMo can say of it, and the callback that injects, proves and logs the rest.
        plugins=precision_plugin(job.recipe),
        callbacks=[Fp8RecipeCallback(job.recipe, run_dir=RUN_DIRECTORY, log_every=5)],
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        logger=False,
    )
    optimizer = nl.MegatronOptimizerModule(OptimizerConfig(optimizer="adam", lr=1e-3, bf16=True))
    llm.train(model=model, data=data, trainer=trainer, optim=optimizer)

    if trainer.is_global_zero:
        from rich.console import Console

        Console().print(
            next(c for c in trainer.callbacks if isinstance(c, Fp8RecipeCallback)).manifest.table()
        )
        print(f"telemetry: {RUN_DIRECTORY}")


class Bytes:
    """Stands in for your tokenizer."""

    vocab_size = 256
    eod = bos_id = pad_id = 0
    eos_id = unk_id = 1
    unique_identifiers: dict[str, Any] = {}  # noqa: RUF012 -- NeMo's attribute, as its tokenizers have it


if __name__ == "__main__":
    main(sys.argv[1:])
