"""Run directories made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from nemo_fp8_recipes.telemetry.series import Series, StepValues
from nemo_fp8_recipes.telemetry.store import StoreWriter

STEPS = (1, 10, 20)
AMAX = {"input": (2.0, 4.0, 16.0), "weight": (0.5, 0.5, 0.5), "grad_output": (1e-3, 1e-4, 1e-5)}
SCALE = {"input": (1.0, 224.0, 56.0), "weight": (1.0, 896.0, 896.0), "grad_output": (1.0, 1e7, 2e9)}


def make(path: Path, *, recipe: str = "delayed", layers: int = 2, telemetry: bool = True) -> Path:
    """A finished run of 20 steps, its loss falling from 5 to 3.1."""
    path.mkdir(parents=True, exist_ok=True)
    record = {
        "schema_version": 1,
        "status": "finished",
        "command": ["nemo-fp8", "train"],
        "overrides": [],
        "recipe": {"name": recipe, "fp8_format": "hybrid"},
        "device": "emulated h100",
        "versions": {},
        "started": "2026-01-01T10:00:00+00:00",
        "ended": "2026-01-01T10:02:11+00:00",
        "error": None,
    }
    (path / "run.json").write_text(json.dumps(record))
    rows = [{"step": step, "loss": 5.0 - step / 10 + 0.1} for step in range(1, 21)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if telemetry:
        per_tensor = recipe in ("delayed", "tensorwise")
        StoreWriter(path, {"recipe": record["recipe"]}).write(
            [_delayed(recipe, layers, i) if per_tensor else _blocks(recipe, layers, i) for i in range(3)]
        )
    return path


def _names(recipe: str, layers: int, stats: tuple[str, ...]) -> tuple[Series, ...]:
    return tuple(
        Series(
            f"decoder.layers.{layer}.mlp.linear_fc1",
            tensor,
            stat,
            recipe,
            "e5m2" if tensor == "grad_output" else "e4m3",
        )
        for layer in range(layers)
        for tensor in AMAX
        for stat in stats
    )


def _delayed(recipe: str, layers: int, index: int) -> StepValues:
    names = _names(recipe, layers, ("amax", "scale"))
    values = [(AMAX if s.stat == "amax" else SCALE)[s.tensor][index] for s in names]
    windows = {
        Series(s.module, s.tensor, "amax_history", s.recipe, s.format): np.float32(
            [0.0, AMAX[s.tensor][index]]
        )
        for s in names
    }
    return StepValues(STEPS[index], names, np.float32(values), windows)


def _blocks(recipe: str, layers: int, index: int) -> StepValues:
    names = _names(recipe, layers, ("amax_bound", "scale_inv_min", "scale_inv_max"))
    values = []
    for s in names:
        amax = AMAX[s.tensor][index]
        values.append(
            {"amax_bound": amax, "scale_inv_min": amax / 448 / 32, "scale_inv_max": amax / 448}[s.stat]
        )
    return StepValues(STEPS[index], names, np.float32(values))
