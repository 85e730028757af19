"""From what the probes read to the statistics of the schema, on the host."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np

from nemo_fp8_recipes.telemetry.probes.base import ReadingSpec
from nemo_fp8_recipes.telemetry.series import FP8_MAX, STATS, WHATIF, Series, StepValues

__all__ = ["derive"]

_SMALLEST_VARIANCE = 2.0**-20
"""Of the square of the mean: below it the difference of two rounded fp32 means nothing."""


def derive(step: int, found: Mapping[ReadingSpec, np.ndarray]) -> StepValues:
    """The values of a step, fp32; docs/schemas/telemetry.md has the formulas.

    An amax that Transformer Engine does not keep is computed from the scale it led to: fp8_max x scale_inv.
    That is the amax to within two units in the last place of fp32 where scales are not rounded to powers of
    two (tensorwise), else an upper bound below twice the amax (`amax_bound`). A tensor of zeros, and one
    whose amax is not finite, has the scale 1 there, and shows fp8_max.
    """
    read: dict[tuple[str, str, str, str, bool], dict[str, np.float32]] = defaultdict(dict)
    powers_of_two = set()
    windows = {}
    for spec, value in found.items():
        if spec.name in STATS and STATS[spec.name].windowed:
            windows[Series(spec.module, spec.tensor, spec.name, spec.recipe, spec.format)] = value
        else:
            operand = (spec.module, spec.tensor, spec.recipe, spec.format, spec.whatif)
            read[operand][spec.name] = np.float32(value[0])
            if spec.power_of_two:
                powers_of_two.add(operand)
    series: list[Series] = []
    values: list[np.float32] = []
    for operand, numbers in read.items():
        module, tensor, recipe, fmt, whatif = operand
        largest = np.float32(FP8_MAX.get(fmt, np.nan))
        with np.errstate(all="ignore"):
            for stat, number in _statistics(numbers, largest, power_of_two=operand in powers_of_two):
                name = f"{WHATIF}/{recipe}/{stat}" if whatif else stat
                series.append(Series(module, tensor, name, recipe, fmt))
                values.append(np.float32(number))
    return StepValues(step, tuple(series), np.asarray(values, dtype=np.float32), windows)


def _statistics(
    read: Mapping[str, np.float32], largest: np.float32, *, power_of_two: bool
) -> Iterator[tuple[str, np.float32 | float]]:
    """What follows from the readings of one operand. All fp32, but for what is said to be fp64."""
    for name, value in read.items():
        if name in STATS:
            yield name, value
    if "scale_inv" in read:
        yield "scale", np.float32(1) / read["scale_inv"]
        yield "amax_bound" if power_of_two else "amax", largest * read["scale_inv"]
    elif "scale_inv_max" in read and "amax" not in read:
        yield "amax_bound", largest * read["scale_inv_max"]
    if "peak" in read:
        yield "headroom", largest / read["peak"]
    if "elements" in read:
        yield from _of_elements(read, largest)
    if "scale_inv_rms" in read:
        mean, square = float(read["scale_inv_mean"]), float(read["scale_inv_rms"]) ** 2
        variance = square - mean * mean
        yield (
            "scale_inv_std",
            np.sqrt(variance)
            if variance > _SMALLEST_VARIANCE * mean * mean
            else (0.0 if np.isfinite(mean) else mean),
        )


def _of_elements(read: Mapping[str, np.float32], largest: np.float32) -> Iterator[tuple[str, float]]:
    """What follows from `elements.measure`; fp64."""
    elements = float(read["elements"])
    counted = (("underflow", "underflows"), ("saturation", "saturated"), ("zeros", "zero_elements"))
    for stat, count in counted:
        yield stat, float(read[count]) / elements
    yield "sqnr", 20.0 * float(np.log10(np.float64(read["norm"]) / np.float64(read["noise"])))
    yield "bulk_error", float(np.float64(read["bulk_noise"]) / np.float64(read["bulk_norm"]))
    amax = np.float64(read["largest"])
    if "scale_inv" in read:
        yield "headroom", float(np.float64(largest) * read["scale_inv"] / amax)
    elif "scale_inv_max" in read and "amax" not in read:
        yield "headroom", float(np.float64(largest) * read["scale_inv_max"] / amax)
    if not {"amax", "scale_inv"} & set(read):
        yield "amax", float(amax)
