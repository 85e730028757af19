"""What every rank of the distributed tests runs: train a small GPT with telemetry, and beside it take down
with plain torch hooks what went into each GEMM, on every rank.

The oracle never uses the exchange between ranks that it checks: each rank's numbers are gathered as objects.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import nemo_fp8_recipes
from nemo_fp8_recipes import telemetry
from nemo_fp8_recipes.injection.module_names import named_modules
from tests.support.gpt import Trainer


def run(name: str, options: dict[str, Any], out: Path, *, steps: int) -> dict[str, Any]:
    """One configuration. Every rank calls this.

    Returns:
        seen: [step, module, tensor, amax, zeros, elements] of every operand on this rank, as JSON holds it.
        alerts: what this rank's callback heard.
    """
    trainer = Trainer(**options)
    recipe = nemo_fp8_recipes.load(
        trainer.recipe, **({"amax_history_len": 4} if trainer.recipe == "delayed" else {})
    )
    seen: dict[tuple[int, str, str], list[float]] = {}
    step = 0

    def take(module: str, tensor: str, value: torch.Tensor) -> None:
        value = value.detach().float()
        if value.numel() == 0:
            return
        found = seen.setdefault((step, module, tensor), [0.0, 0.0, 0.0])
        found[0] = max(found[0], float(value.abs().max()))
        found[1] += float((value == 0).sum())
        found[2] += value.numel()

    def watch(path: str, module: Any) -> None:
        fused_norm = hasattr(module, "layer_norm_weight")

        def before(_: Any, arguments: Any) -> None:
            if torch.is_grad_enabled():
                if not fused_norm:  # what a fused norm hands to its GEMM cannot be seen from outside
                    take(path, "input", arguments[0])
                take(path, "weight", module.weight)

        def after(_: Any, __: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if first.requires_grad:
                first.register_hook(lambda gradient: take(path, "grad_output", gradient))

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    for named in named_modules(trainer.model):
        if type(named.module).__name__.startswith("TE") and getattr(named.module, "weight", None) is not None:
            watch(named.path, named.module)

    alerts: list[list[Any]] = []
    directory = out / name / f"rank{dist.get_rank()}"
    recorder = telemetry.attach(
        trainer.model,
        recipe,
        directory=directory,
        log_every=1,
        stats_every=1,
        sinks=["parquet"],
        on_alert=lambda found: alerts.extend([alert.step, alert.rule] for alert in found),
    )
    for step in range(1, steps + 1):
        recorder.begin_step(step)
        trainer.step()
        recorder.end_step(step)
    recorder.flush()
    recorder.close()
    dist.barrier()
    return {
        "seen": [[*key, *found] for key, found in seen.items()],
        "alerts": alerts,
        "wrote": directory.exists(),
    }
