"""What each rule looks at: it sees one logging step after the other and says which operands violate it."""

from __future__ import annotations

import fnmatch
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from nemo_fp8_recipes.telemetry.alerts.columns import Columns
from nemo_fp8_recipes.telemetry.alerts.schema import (
    AlertsConfig,
    GrowthRule,
    LimitRule,
    ThresholdRule,
)
from nemo_fp8_recipes.telemetry.series import FP8_MAX

__all__ = ["Finding", "RuleCheck", "checks"]

ROUNDS_TO_MAX = {"e4m3": 464.0 / 448.0, "e5m2": 61440.0 / 57344.0}
"""Scaled values up to this multiple of the largest value lose no more than any value does by rounding."""

_FLT_MAX = float(np.finfo(np.float32).max)
_E8M0_ENDS = (2.0**-126, 2.0**127)
"""Code 0 stands for blocks of zeros in the statistics, so 2^-126 is the smallest scale that counts."""


_AXES = 256
"""Positions of windows that are kept."""

_SLACK = 1e-6
"""Of a growth in log2, far above what rounding does to it."""


@dataclass(frozen=True)
class Finding:
    """What a rule found in a step. Both arrays have one entry an operand.

    Attributes:
        violated: bool.
        value: the number that was compared, float64.
        severity: the larger, the worse; None: `value`.
        window: what a message says for `{window}`.
    """

    violated: np.ndarray
    value: np.ndarray
    severity: np.ndarray | None = None
    window: int = 0


@functools.lru_cache(maxsize=8)
def _nothing(operands: int, window: int) -> Finding:
    """No operand violates the rule. The same arrays every time: nobody writes to a finding."""
    violated, value = np.zeros(operands, dtype=bool), np.full(operands, np.nan)
    violated.flags.writeable = value.flags.writeable = False
    return Finding(violated, value, window=window)


class RuleCheck:
    """One rule with its memory.

    Attributes:
        stats: statistics that the rule needs, one of them at least.
        limit: what a message says for `{limit}`.
        without: what to do when none of them is logged.
        reads_tensors: they are of the tier that reads the tensors again.
        quiet: statistic -> the range, both ends included, within which it violates nothing. A step all of
            whose values lie within need not be checked, unless `sees` something. None: only `check` can tell.
    """

    stats: tuple[str, ...] = ()
    quiet: Mapping[str, tuple[float, float]] | None = None
    limit = 0.0
    without = ""
    reads_tensors = False

    def check(self, columns: Columns) -> Finding:
        raise NotImplementedError

    def applies(self, columns: Columns) -> bool:
        """Whether the step has what the rule needs."""
        return any(columns.has(stat) for stat in self.stats)

    def ranges(self, columns: Columns) -> Mapping[str, tuple[float, float]] | None:
        """`quiet`, for steps with these statistics."""
        del columns  # for those that need more than one
        return self.quiet

    def sees(self, columns: Columns) -> bool:
        """Whether there is something beside the numbers that `check` should look at."""
        del columns  # for those that look at windows
        return False

    def forget(self) -> None:
        """Training goes on from an earlier step."""


class Saturation(RuleCheck):
    """Delayed scaling cast with a scale made for a smaller amax: amax x scale above the format's largest
    value by more than rounding takes back. `headroom` knows the worst micro-batch; without it the step's
    amax and the scale of its last micro-batch have to do.
    """

    stats = ("scale_next",)

    def __init__(self, rule: ThresholdRule) -> None:
        self.limit = rule.limit

    def ranges(self, columns: Columns) -> Mapping[str, tuple[float, float]] | None:
        """Where every operand has its headroom, that alone tells."""
        delayed = columns.table.of_recipe("delayed") & columns.present("scale_next")
        if (delayed & ~columns.present("headroom")).any():
            return None
        least = 1 / (self.limit * min(ROUNDS_TO_MAX.values()))
        return {"headroom": (np.nextafter(np.float32(least), np.float32(np.inf)), np.inf)}

    def check(self, columns: Columns) -> Finding:
        delayed = columns.table.of_recipe("delayed")
        largest = columns.table.of_format("largest", FP8_MAX, np.nan)
        rounding = columns.table.of_format("rounding", ROUNDS_TO_MAX, 1.0)
        with np.errstate(invalid="ignore", over="ignore"):
            of_step = columns.get("amax") * columns.get("scale") / largest
            ratio = np.where(columns.present("headroom"), 1 / columns.get("headroom"), of_step)
            violated = delayed & np.isfinite(ratio) & (ratio > self.limit * rounding)
        return Finding(violated, ratio)


class HistoryFrozen(RuleCheck):
    """An Inf in the amax history: the largest entry is not finite, so Transformer Engine keeps the scale
    (`common/recipe/delayed_scaling.cu`). Without the windows in the telemetry, an amax of Inf says that it
    begins.
    """

    stats = ("scale_next",)
    quiet = MappingProxyType({"amax": (-_FLT_MAX, _FLT_MAX)})

    def sees(self, columns: Columns) -> bool:
        return bool(columns.frozen()[0])

    def check(self, columns: Columns) -> Finding:
        amax = columns.get("amax")
        infinite = np.isinf(amax)
        violated = columns.table.of_recipe("delayed") & infinite
        rows, length = columns.frozen()
        violated[rows] = True
        return Finding(violated, amax, infinite.astype(np.float64), window=length)


class NonFinite(RuleCheck):
    """The tensor held a NaN or an Inf. An MXFP8 block with a NaN has the scale code 255, shown as Inf."""

    stats = ("amax", "amax_bound")
    quiet = MappingProxyType(
        {
            "amax": (-_FLT_MAX, _FLT_MAX),
            "amax_bound": (-_FLT_MAX, _FLT_MAX),
            "non_finite": (-np.inf, 0.0),
            "nonfinite": (-np.inf, 0.0),
        }
    )

    def check(self, columns: Columns) -> Finding:
        amax = columns.amax()
        present = columns.present("amax") | columns.present("amax_bound")
        violated = present & ~np.isfinite(amax)
        for stat in ("non_finite", "nonfinite"):
            if columns.has(stat):
                count = columns.get(stat)
                violated |= count > 0
        return Finding(violated, amax, violated.astype(np.float64))


class ScaleLimit(RuleCheck):
    """The scale reached the end of its own format: FP32 for delayed, tensorwise and blockwise, E8M0 for
    MXFP8.
    """

    stats = ("scale", "scale_next", "scale_inv_max", "scale_inv_min")
    quiet = MappingProxyType(
        {
            "scale": (np.nextafter(1 / _FLT_MAX, 1), np.nextafter(_FLT_MAX, 0)),
            "scale_next": (np.nextafter(1 / _FLT_MAX, 1), np.nextafter(_FLT_MAX, 0)),
            "scale_inv_max": (-np.inf, np.nextafter(_E8M0_ENDS[1], 0)),
            "scale_inv_min": (np.nextafter(_E8M0_ENDS[0], 1), np.nextafter(_FLT_MAX, 0)),
        }
    )

    def check(self, columns: Columns) -> Finding:
        table = columns.table
        violated = np.zeros(len(table), dtype=bool)
        value = np.full(len(table), np.nan)
        for stat, lowest, highest, only in (
            ("scale", 1 / _FLT_MAX, _FLT_MAX, None),
            ("scale_next", 1 / _FLT_MAX, _FLT_MAX, None),
            ("scale_inv_max", 0.0, _E8M0_ENDS[1], "mxfp8"),
            ("scale_inv_min", _E8M0_ENDS[0], _FLT_MAX, "mxfp8"),
            ("scale_inv_max", 0.0, _FLT_MAX, "blockwise"),
        ):
            if not columns.has(stat):
                continue
            found = columns.get(stat)
            at_end = (found <= lowest) | (found >= highest)
            if not at_end.any():
                continue
            # 0 is a tensor or block of zeros, NaN an absent value; Inf is what `non_finite` reports.
            at_end &= (found > 0) & np.isfinite(found)
            if only is not None:
                at_end &= table.of_recipe(only)
            value = np.where(at_end, found, value)
            violated |= at_end
        if not violated.any():
            return Finding(violated, value)
        return Finding(violated, value, np.abs(np.log2(np.where(violated, value, 1.0))))


class Underflow(RuleCheck):
    """Too many elements became zero. Delayed scaling's first cast, with the scale 1 that no amax has made, is
    left out: every run has it.
    """

    stats = ("underflow",)
    without = "It needs the statistics that read the tensors again: set telemetry.stats_every."
    reads_tensors = True

    def __init__(self, rule: ThresholdRule) -> None:
        self.limit = rule.limit
        self.quiet = {"underflow": (-np.inf, rule.limit)}

    def check(self, columns: Columns) -> Finding:
        fraction = columns.get("underflow")
        first_cast = columns.table.of_recipe("delayed") & (columns.get("scale") == 1.0)
        return Finding((fraction > self.limit) & ~first_cast, fraction)


class AmaxGrowth(RuleCheck):
    """log2(amax) is a rising straight line over the window: least squares over the step, with growth from
    its first to its last point above the limit and r squared of at least `steadiness`.
    """

    stats = ("amax", "amax_bound")

    def __init__(self, rule: GrowthRule) -> None:
        self.limit = rule.limit
        self._rule = rule
        self.forget()

    def forget(self) -> None:
        # The last steps, in any order: the newest takes the place of the oldest.
        self._steps = [0] * self._rule.window
        self._logs = np.zeros((self._rule.window, 0))
        self._seen = 0
        self._axes: dict[tuple[int, ...], tuple[np.ndarray, float, float]] = {}

    def check(self, columns: Columns) -> Finding:
        amax, size, window = columns.amax(), len(columns.table), self._rule.window
        if self._logs.shape[1] < size:  # operands seen later have no value in earlier steps
            missing = np.full((window, size - self._logs.shape[1]), np.nan)
            self._logs = np.concatenate([self._logs, missing], axis=1)
        row = self._seen % window
        self._steps[row] = columns.step
        self._seen += 1
        with np.errstate(divide="ignore", invalid="ignore"):
            np.log2(amax, out=self._logs[row])
            x, length, squares = self._axis(columns.step)
            # The slope of the line alone rules out most steps. It is summed in another order than below,
            # hence the slack. Where a value is no number, it is none or not finite.
            steep = x @ self._logs > (math.log2(self.limit) - _SLACK) * squares / length
        if self._seen < window or not steep.any():
            return _nothing(size, window)
        y = np.where(np.isfinite(self._logs), self._logs, np.nan)  # of zeros, Inf and what is absent
        deviation = y - y.mean(axis=0)
        slope = x @ deviation / squares
        spread = (deviation**2).sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            r_squared = slope**2 * squares / spread
            growth = np.exp2(slope * length)
            violated = (growth > self.limit) & (r_squared >= self._rule.steadiness)
        return Finding(violated, growth, window=window)

    def _axis(self, step: int) -> tuple[np.ndarray, float, float]:
        """Steps of the window less their mean; from its first to its last; sum of their squares. The same
        every time that the window's beginning comes round, where the steps between are alike.
        """
        key = tuple(map(step.__sub__, self._steps))
        known = self._axes.get(key)
        if known is None:
            if len(self._axes) >= _AXES:
                self._axes.clear()
            x = np.asarray(self._steps, dtype=np.float64)
            length, x = float(x.max() - x.min()), x - x.mean()
            known = self._axes[key] = (x, max(length, 1.0), max(float(x @ x), 1.0))
        return known


class RanksDisagree(RuleCheck):
    """Largest over smallest scale of the ranks. Only where all ranks reduce the amax do they have to agree.

    `scale` is the smallest and `scale_max`, which is there only where it differs, the largest.
    """

    stats = ("scale_max",)

    def __init__(self, rule: ThresholdRule) -> None:
        self.limit = rule.limit

    def check(self, columns: Columns) -> Finding:
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = columns.get("scale_max") / columns.get("scale")
        return Finding(columns.table.of_recipe("delayed") & (ratio > self.limit), ratio)


class Limit(RuleCheck):
    """A statistic above or below a number, of the modules and tensors that the user named."""

    def __init__(self, rule: LimitRule) -> None:
        self.stats = (rule.stat,)
        self.without = f"No statistic '{rule.stat}' was logged: see docs/schemas/telemetry.md for the names."
        self.limit = rule.above if rule.above is not None else float(rule.below or 0.0)
        self.quiet = {rule.stat: (-np.inf, self.limit) if rule.above is not None else (self.limit, np.inf)}
        self._rule = rule
        self._wanted = np.zeros(0, dtype=bool)

    def check(self, columns: Columns) -> Finding:
        operands = columns.table.operands
        if len(self._wanted) != len(operands):
            self._wanted = np.asarray(
                [
                    fnmatch.fnmatchcase(module, self._rule.module) and self._rule.tensor in ("any", tensor)
                    for module, tensor in operands
                ],
                dtype=bool,
            )
        value = columns.get(self._rule.stat)
        beyond = value > self.limit if self._rule.above is not None else value < self.limit
        return Finding(self._wanted & beyond, value, value if self._rule.above is not None else -value)


def checks(config: AlertsConfig, *, amax_reduced: bool = True) -> dict[str, RuleCheck]:
    """The enabled rules by name.

    Args:
        amax_reduced: the recipe reduces the amax over all ranks, so that their scales have to agree.
    """
    found: dict[str, RuleCheck] = {
        "saturation": Saturation(config.saturation),
        "history_frozen": HistoryFrozen(),
        "non_finite": NonFinite(),
        "scale_limit": ScaleLimit(),
        "underflow": Underflow(config.underflow),
        "amax_growth": AmaxGrowth(config.amax_growth),
        "ranks_disagree": RanksDisagree(config.ranks_disagree),
        **{name: Limit(rule) for name, rule in config.custom.items()},
    }
    if not amax_reduced:
        del found["ranks_disagree"]
    rules = config.rules()
    return {name: check for name, check in found.items() if rules[name].enabled}
