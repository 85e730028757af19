"""What every rank of the distributed tests runs: train a small GPT with telemetry, and beside it take down
with plain torch hooks what went into each GEMM, on every rank.

The oracle never uses the exchange between ranks that it checks: each rank's numbers are gathered as objects.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import nemo_fp8_recipes
from nemo_fp8_recipes import telemetry
from nemo_fp8_recipes.injection.module_names import named_modules
from nemo_fp8_recipes.telemetry.series import FP8_MAX
from tests.support.gpt import Trainer
from tests.telemetry.oracle import quantised


@dataclass
class Sums:
    """What one rank saw of an operand in a step, over its micro-batches; by numpy and ml_dtypes.

    Attributes:
        peak: largest amax x scale, delayed scaling only.
        exponents: of the MXFP8 block scales, as a string -> their number.
        blocks: of one tensor.
    """

    amax: float = 0.0
    peak: float = 0.0
    elements: float = 0.0
    zeros: float = 0.0
    underflows: float = 0.0
    saturated: float = 0.0
    norm: float = 0.0
    noise: float = 0.0
    bulk_norm: float = 0.0
    bulk_noise: float = 0.0
    blocks: int = 0
    exponents: dict[str, int] = field(default_factory=dict)

    def add(self, x: np.ndarray, recipe: str, tensor: str, scale: float | None) -> None:
        amax = float(np.abs(x).max())
        self.amax = max(self.amax, amax)
        self.elements += x.size
        self.zeros += float((x == 0).sum())
        fmt = "e5m2" if tensor == "grad_output" and recipe in ("delayed", "tensorwise") else "e4m3"
        if scale is not None:
            self.peak = max(self.peak, amax * scale)
            self.saturated += float((np.abs(x) > FP8_MAX[fmt] / scale * (1 + 2e-7)).sum())
        if amax == 0:
            return
        q = quantised(x, recipe, tensor, fmt, scale)
        assert q is not None
        self.underflows += float(((x != 0) & (q == 0)).sum())
        error = (q - x).astype(np.float64)
        bulk = np.abs(x) <= np.percentile(np.abs(x), 99, method="inverted_cdf")
        self.norm += float(np.square(x, dtype=np.float64).sum())
        self.noise += float(np.square(error).sum())
        self.bulk_norm += float(np.square(x[bulk], dtype=np.float64).sum())
        self.bulk_noise += float(np.square(error[bulk]).sum())
        if recipe == "mxfp8":
            blocks = np.abs(x).reshape(x.shape[0], -1, 32).max(axis=2)
            self.blocks = blocks.size
            used = np.ceil(np.log2(blocks[blocks > 0] / FP8_MAX[fmt])).astype(int)
            for exponent, number in zip(*np.unique(used, return_counts=True), strict=True):
                self.exponents[str(exponent)] = self.exponents.get(str(exponent), 0) + int(number)


def run(name: str, options: dict[str, Any], out: Path, *, steps: int) -> dict[str, Any]:
    """One configuration. Every rank calls this.

    Returns:
        seen: [step, module, tensor, sums] of every operand on this rank, `Sums` as a dict, as JSON holds it.
        alerts: what this rank's callback heard.
    """
    trainer = Trainer(**options)
    recipe = nemo_fp8_recipes.load(
        trainer.recipe, **({"amax_history_len": 4} if trainer.recipe == "delayed" else {})
    )
    seen: dict[tuple[int, str, str], Sums] = {}
    step = 0

    def take(module: str, tensor: str, value: torch.Tensor, scale: float | None) -> None:
        if value.numel() == 0:
            return
        key = (step, module, tensor)
        if tensor == "weight" and key in seen:
            return  # kept for the micro-batches of a step
        x = value.detach().float().reshape(-1, value.shape[-1]).numpy()
        seen.setdefault(key, Sums()).add(x, trainer.recipe, tensor, scale)

    def scale_of(module: Any, direction: str, slot: int) -> float | None:
        """The scale that delayed scaling is about to cast with, 1 in the first cast; None elsewhere."""
        if trainer.recipe != "delayed":
            return None
        state = module.fp8_meta.get(direction)
        return float(state.scale[slot]) if state is not None else 1.0

    def watch(path: str, module: Any) -> None:
        fused_norm = hasattr(module, "layer_norm_weight")

        def before(_: Any, arguments: Any) -> None:
            if torch.is_grad_enabled():
                if not fused_norm:  # what a fused norm hands to its GEMM cannot be seen from outside
                    take(path, "input", arguments[0], scale_of(module, "scaling_fwd", 0))
                weight = module.weight
                if trainer.fp8_param:  # what the quantised parameter was written from, wherever it is
                    shape, weight = weight.shape, weight.main_param
                    if trainer.distributed_optimizer:
                        pieces: list[Any] = [None] * dist.get_world_size()
                        dist.all_gather_object(pieces, weight)
                        weight = torch.cat([piece for piece in pieces if piece is not None]).bfloat16()
                    weight = weight.view(shape)
                take(path, "weight", weight, scale_of(module, "scaling_fwd", 1))

        def after(_: Any, __: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if first.requires_grad:
                first.register_hook(
                    lambda gradient: take(path, "grad_output", gradient, scale_of(module, "scaling_bwd", 0))
                )

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
        "seen": [[*key, dataclasses.asdict(found)] for key, found in seen.items()],
        "alerts": alerts,
        "wrote": directory.exists(),
    }
