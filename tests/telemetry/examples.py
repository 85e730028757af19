"""Values of logging steps made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nemo_fp8_recipes.telemetry.series import TENSORS, Series, StepValues

METADATA = {"recipe": {"name": "delayed", "margin": 0}, "device": "emulated h100", "world_size": 1}


def series(layers: int = 2, stats: Sequence[str] = ("amax", "scale")) -> tuple[Series, ...]:
    return tuple(
        Series(f"decoder.layers.{layer}.mlp.linear_fc1", tensor, stat, "delayed", "e4m3")
        for layer in range(layers)
        for tensor in TENSORS
        for stat in stats
    )


def step(number: int, *, layers: int = 2, window: int = 0) -> StepValues:
    """A step whose numbers are all different and depend on the step."""
    named = series(layers)
    values = np.asarray([number + index / 1024 for index in range(len(named))], dtype=np.float32)
    windows = {}
    if window:
        for name in {Series(s.module, s.tensor, "amax_history", s.recipe, s.format) for s in named}:
            windows[name] = np.arange(number, number + window, dtype=np.float32)
    return StepValues(number, named, values, windows)
