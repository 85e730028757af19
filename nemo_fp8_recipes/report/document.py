"""The report for machines."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from nemo_fp8_recipes.report.effect import TensorEffect, effects
from nemo_fp8_recipes.report.run import load

__all__ = ["SCHEMA_VERSION", "document"]

SCHEMA_VERSION = 1

_WINDOW = 32
"""Entries of an amax history window that are given. Windows have up to thousands, of every tensor; the store
has all of them (`telemetry.store.read(run_dir, stat="amax_history")`).
"""


def document(run_dir: str | Path) -> dict[str, Any]:
    """The report of a run as plain data for JSON.

    Returns:
        schema_version, run (`run.json`), loss (first and last step and loss), tensors (the fields of
        `TensorEffect` and growth; of `window` the newest 32 entries, and how many it has as window_length),
        alerts (the fields of `Alert`). A number that is not finite is None.

    Raises:
        ReportError: see `run.load`.
    """
    run = load(run_dir)
    losses = run.losses
    return _finite(
        {
            "schema_version": SCHEMA_VERSION,
            "path": str(run.path),
            "run": dict(run.record),
            "quantized_modules": None if run.manifest is None else len(run.manifest.quantized()),
            "modules": None if run.manifest is None else len(run.manifest.rows),
            "loss": None
            if not losses
            else {
                "first_step": losses[0][0],
                "first": losses[0][1],
                "last_step": losses[-1][0],
                "last": losses[-1][1],
            },
            "alerts": [alert.to_dict() for alert in run.alerts],
            "tensors": [_tensor(effect) for effect in effects(run.telemetry)],
        }
    )


def _tensor(effect: TensorEffect) -> dict[str, Any]:
    window = effect.window
    return {
        **dataclasses.asdict(effect),
        "window": None if window is None else window[-_WINDOW:],
        "window_length": None if window is None else len(window),
        "growth": effect.growth,
    }


def _finite(value: Any) -> Any:
    """`value` with every NaN and Inf, which JSON lacks, replaced by None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
