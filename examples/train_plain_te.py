"""A plain PyTorch loop over Transformer Engine modules that takes `fp8_recipe=…` on its command line.

What this package adds is marked 1 to 3; everything else is PyTorch and Transformer Engine.

    python examples/train_plain_te.py fp8_recipe=mxfp8                                # no GPU: emulated
    torchrun --nproc-per-node 8 examples/train_plain_te.py fp8_recipe=blockwise       # a GPU node
"""

from __future__ import annotations

import os
import sys
from typing import Any

import nemo_fp8_recipes as fp8
from nemo_fp8_recipes.config import compose

STEPS, BATCH, SEQUENCE, VOCABULARY, HIDDEN, HEADS, LAYERS = 20, 4, 64, 128, 128, 4, 2


def main(overrides: list[str]) -> None:
    # 1. Recipe, preflight and device, before torch and Transformer Engine are imported.
    config = compose(overrides)
    job = fp8.start(fp8.load(config.fp8_recipe), device=config.device, hardware=config.hardware.name)

    import torch
    from transformer_engine import pytorch as te

    on_gpu = not job.device.emulated
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if distributed:
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    rank = torch.distributed.get_rank() if distributed else 0

    class Gpt(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            options: dict[str, Any] = {"params_dtype": torch.bfloat16, "device": "cuda"}
            self.embedding = torch.nn.Embedding(VOCABULARY, HIDDEN, dtype=torch.bfloat16, device="cuda")
            self.layers = torch.nn.ModuleList(
                te.TransformerLayer(
                    HIDDEN, 4 * HIDDEN, HEADS, hidden_dropout=0.0, attention_dropout=0.0, **options
                )
                for _ in range(LAYERS)
            )
            self.head = te.LayerNormLinear(HIDDEN, VOCABULARY, **options)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            hidden = self.embedding(tokens).transpose(0, 1)
            for layer in self.layers:
                hidden = layer(hidden, self_attn_mask_type="causal")
            logits: torch.Tensor = self.head(hidden).transpose(0, 1)
            return logits

    torch.manual_seed(1234)
    model: Any = Gpt()
    if distributed:
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    # 2. Telemetry: amax, scale and history of every quantised tensor.
    recorder = fp8.telemetry.attach(model, job.recipe, log_every=5)
    generator = torch.Generator().manual_seed(rank)
    for step in range(1, STEPS + 1):
        walk = torch.randint(-2, 3, (BATCH, SEQUENCE + 1), generator=generator).cumsum(1) % VOCABULARY
        tokens = walk.to("cuda")
        optimizer.zero_grad()
        recorder.begin_step(step)
        # 3. The recipe.
        with fp8.autocast(job.recipe):
            logits = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        recorder.end_step(step, {"loss": loss.item()})
        if rank == 0:
            print(f"step {step:3d}  loss {loss.item():.4f}")
    recorder.flush()
    recorder.close()

    if rank == 0:
        from rich.console import Console

        Console().print(fp8.manifest(model, job.recipe).table())
        print(f"{job.recipe.name} on {job.device.label}; telemetry: {recorder.directory}")
    if distributed:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
