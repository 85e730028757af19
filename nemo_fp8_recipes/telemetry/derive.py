"""From what the probes read to the statistics of the schema, on the host."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from nemo_fp8_recipes.telemetry.found import Found
from nemo_fp8_recipes.telemetry.probes.base import ReadingSpec
from nemo_fp8_recipes.telemetry.rows import Rows
from nemo_fp8_recipes.telemetry.series import FP8_MAX, STATS, WHATIF, Series, StepValues

__all__ = ["derive"]

_SMALLEST_VARIANCE = 2.0**-20
"""Of the square of the mean: below it the difference of two rounded fp32 means nothing."""

Formula = Callable[..., np.ndarray]


def derive(step: int, found: Found) -> StepValues:
    """The values of a step, fp32; docs/schemas/telemetry.md has the formulas.

    An amax that Transformer Engine does not keep is computed from the scale it led to: fp8_max x scale_inv.
    That is the amax to within two units in the last place of fp32 where scales are not rounded to powers of
    two (tensorwise), else an upper bound below twice the amax (`amax_bound`). A tensor of zeros, and one
    whose amax is not finite, has the scale 1 there, and shows fp8_max.
    """
    plan = _plan_for(found.specs)
    read = found.numbers
    windows: Mapping[Series, np.ndarray]
    if isinstance(found.windows, Rows) and not plan.windows:
        windows = Rows(_all_series(found.windows.names), found.windows.matrix)
    else:
        windows = {
            **{series: read[index : index + 1] for series, index in plan.windows},
            **{_series(spec): window for spec, window in found.windows.items()},
        }
    with np.errstate(all="ignore"):
        parts = [
            np.asarray(group.formula(group.largest, *(read[index] for index in group.arguments)), np.float32)
            for group in plan.groups
        ]
    return StepValues(step, plan.series, np.concatenate([np.zeros(0, np.float32), *parts]), windows)


class _Group(NamedTuple):
    """Values of one formula, computed together.

    Attributes:
        formula: of the formats' largest magnitudes, fp32 (n,), and the readings, fp32 (n,) each.
        largest: fp32 (n,).
        arguments: positions of each reading, int64 (n,).
    """

    formula: Formula
    largest: np.ndarray
    arguments: tuple[np.ndarray, ...]


class _Plan(NamedTuple):
    """What follows from a list of readings: the same in every step that reads the same.

    Attributes:
        series: names of the values, group by group.
        groups: how they are computed.
        windows: windows of one number, and the positions of their readings.
    """

    series: tuple[Series, ...]
    groups: tuple[_Group, ...]
    windows: tuple[tuple[Series, int], ...]


_KEPT = 16
_plans: dict[int, tuple[tuple[ReadingSpec, ...], _Plan]] = {}
"""By the id of the list of readings, which steps that read the same share: its hash is one of all names."""


def _plan_for(specs: tuple[ReadingSpec, ...]) -> _Plan:
    known = _plans.get(id(specs))
    if known is None:
        if len(_plans) >= _KEPT:
            _plans.clear()
        known = _plans[id(specs)] = (specs, _plan(specs))
    return known[1]


@functools.lru_cache(maxsize=_KEPT)
def _plan(specs: tuple[ReadingSpec, ...]) -> _Plan:
    places: dict[tuple[str, str, str, str, bool], dict[str, int]] = defaultdict(dict)
    powers_of_two = set()
    windows = []
    for place, spec in enumerate(specs):
        if spec.name in STATS and STATS[spec.name].windowed:
            windows.append((_series(spec), place))
            continue
        operand = (spec.module, spec.tensor, spec.recipe, spec.format, spec.whatif)
        places[operand][spec.name] = place
        if spec.power_of_two:
            powers_of_two.add(operand)
    members: dict[Formula, list[tuple[Series, float, tuple[int, ...]]]] = defaultdict(list)
    for operand, read in places.items():
        module, tensor, recipe, fmt, whatif = operand
        for stat, formula, names in _statistics(read, power_of_two=operand in powers_of_two):
            series = Series(module, tensor, f"{WHATIF}/{recipe}/{stat}" if whatif else stat, recipe, fmt)
            arguments = tuple(read[name] for name in names)
            members[formula].append((series, FP8_MAX.get(fmt, np.nan), arguments))
    groups = tuple(
        _Group(
            formula,
            np.asarray([largest for _, largest, _ in those], dtype=np.float32),
            tuple(np.asarray([arguments for _, _, arguments in those], dtype=np.int64).T),
        )
        for formula, those in members.items()
    )
    ordered = tuple(one for those in members.values() for one, _, _ in those)
    return _Plan(ordered, groups, tuple(windows))


@functools.lru_cache(maxsize=1 << 14)
def _series(spec: ReadingSpec) -> Series:
    """The series of a reading that is a statistic as it is."""
    name = f"{WHATIF}/{spec.recipe}/{spec.name}" if spec.whatif else spec.name
    return Series(spec.module, spec.tensor, name, spec.recipe, spec.format)


_windows: dict[int, tuple[tuple[ReadingSpec, ...], tuple[Series, ...]]] = {}
"""By the id of the list of windows, as `_plans`."""


def _all_series(specs: tuple[ReadingSpec, ...]) -> tuple[Series, ...]:
    known = _windows.get(id(specs))
    if known is None:
        if len(_windows) >= _KEPT:
            _windows.clear()
        known = _windows[id(specs)] = (specs, tuple(map(_series, specs)))
    return known[1]


def _statistics(
    read: Mapping[str, int], *, power_of_two: bool
) -> Iterator[tuple[str, Formula, tuple[str, ...]]]:
    """Statistics that follow from the readings of one operand: name, formula, and the readings it takes."""
    for name in read:
        if name in STATS:
            yield name, _as_read, (name,)
    if "scale_inv" in read:
        yield "scale", _inverse, ("scale_inv",)
        yield "amax_bound" if power_of_two else "amax", _times_largest, ("scale_inv",)
    elif "scale_inv_max" in read and "amax" not in read:
        yield "amax_bound", _times_largest, ("scale_inv_max",)
    if "peak" in read:
        yield "headroom", _over_largest, ("peak",)
    if "scale_inv_rms" in read:
        yield "scale_inv_std", _deviation, ("scale_inv_mean", "scale_inv_rms")
    if "elements" in read:
        yield "underflow", _ratio, ("underflows", "elements")
        yield "saturation", _ratio, ("saturated", "elements")
        yield "zeros", _ratio, ("zero_elements", "elements")
        yield "sqnr", _decibels, ("norm", "noise")
        yield "bulk_error", _ratio, ("bulk_noise", "bulk_norm")
        if "amax" not in read and "scale_inv" not in read:
            yield "amax", _as_read, ("largest",)
        scale_inv = next((name for name in ("scale_inv", "scale_inv_max") if name in read), None)
        if scale_inv is not None and "amax" not in read:
            yield "headroom", _headroom, (scale_inv, "largest")


# In fp32, as on the device.


def _as_read(_: np.ndarray, value: np.ndarray) -> np.ndarray:
    return value


def _inverse(_: np.ndarray, value: np.ndarray) -> np.ndarray:
    return np.float32(1) / value


def _times_largest(largest: np.ndarray, value: np.ndarray) -> np.ndarray:
    return largest * value


def _over_largest(largest: np.ndarray, value: np.ndarray) -> np.ndarray:
    return largest / value


# In fp64.


def _ratio(_: np.ndarray, part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return part.astype(np.float64) / whole


def _decibels(_: np.ndarray, norm: np.ndarray, noise: np.ndarray) -> np.ndarray:
    return 20.0 * np.log10(norm.astype(np.float64) / noise)


def _headroom(largest: np.ndarray, scale_inv: np.ndarray, amax: np.ndarray) -> np.ndarray:
    return largest.astype(np.float64) * scale_inv / amax


def _deviation(_: np.ndarray, mean: np.ndarray, rms: np.ndarray) -> np.ndarray:
    square = np.square(mean.astype(np.float64))
    variance = np.square(rms.astype(np.float64)) - square
    deviation = np.where(variance > _SMALLEST_VARIANCE * square, np.sqrt(variance), 0.0)
    return np.where(np.isfinite(mean), deviation, mean)
