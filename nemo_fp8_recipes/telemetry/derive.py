"""From what the probes read to the statistics of the schema, on the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from nemo_fp8_recipes.telemetry.probes.base import ReadingSpec
from nemo_fp8_recipes.telemetry.series import FP8_MAX, STATS, Series, StepValues

__all__ = ["derive"]


def derive(step: int, found: Mapping[ReadingSpec, np.ndarray]) -> StepValues:
    """The values of a step. All arithmetic is fp32, as on the device.

    An amax that Transformer Engine does not keep is computed from the scale it led to: fp8_max x scale_inv.
    That is the amax to within two units in the last place of fp32 where scales are not rounded to powers of
    two (tensorwise), else an upper bound below twice the amax (`amax_bound`). A tensor of zeros, and one
    whose amax is not finite, has the scale 1 there, and shows fp8_max.
    """
    series: list[Series] = []
    values: list[np.float32] = []
    windows = {}
    for spec, value in found.items():
        if STATS[spec.name].windowed:
            windows[_series(spec, spec.name)] = value
            continue
        for stat, number in _statistics(spec, np.float32(value[0])):
            series.append(_series(spec, stat))
            values.append(number)
    return StepValues(step, tuple(series), np.asarray(values, dtype=np.float32), windows)


def _statistics(spec: ReadingSpec, value: np.float32) -> Iterator[tuple[str, np.float32]]:
    yield spec.name, value
    largest = np.float32(FP8_MAX.get(spec.format, np.nan))
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        if spec.name == "scale_inv":
            yield "scale", np.float32(1) / value
            yield "amax_bound" if spec.power_of_two else "amax", largest * value
        elif spec.name == "scale_inv_max":
            yield "amax_bound", largest * value


def _series(spec: ReadingSpec, stat: str) -> Series:
    return Series(spec.module, spec.tensor, stat, spec.recipe, spec.format)
