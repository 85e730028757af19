"""Runs the rules over the logging steps, and reports what begins, not what lasts."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from nemo_fp8_recipes.telemetry.alerts.alert import Alert
from nemo_fp8_recipes.telemetry.alerts.columns import Columns, OperandTable
from nemo_fp8_recipes.telemetry.alerts.rules import Finding, checks
from nemo_fp8_recipes.telemetry.alerts.schema import DEFAULT_ADVICE, AlertsConfig
from nemo_fp8_recipes.telemetry.series import Series, StepValues

__all__ = ["Watch", "reduces_amax"]

logger = logging.getLogger(__name__)

_KEPT = 8
"""Different sets of series that may take turns, such as those of the two tiers."""

PATIENCE = 20
"""Logging steps after which a rule says that what it needs is not logged."""


def reduces_amax(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe, as plain data, makes all ranks agree on the scales of delayed scaling."""
    return bool(recipe.get("reduce_amax", True)) and not recipe.get("tp_only_amax_red", False)


class _Due(NamedTuple):
    """What a step with certain series is asked.

    Attributes:
        rules: those that have what they need.
        quiet: those of them that violate nothing where all values are in range.
        least, most: float64 (series,), the range in which a value violates none of those that say so.
    """

    rules: tuple[str, ...]
    quiet: frozenset[str]
    least: np.ndarray
    most: np.ndarray


class Watch:
    """The rules of a run.

    Args:
        config: which rules, and their limits.
        amax_reduced: see `rules.checks`.
        reads_tensors: whether the run logs the statistics that read the tensors again, however seldom.
    """

    def __init__(
        self, config: AlertsConfig, *, amax_reduced: bool = True, reads_tensors: bool = False
    ) -> None:
        self._config = config
        self._checks = checks(config, amax_reduced=amax_reduced) if config.enabled else {}
        self._table = OperandTable()
        self._count = 0
        self._looks: dict[str, int] = dict.fromkeys(self._checks, 0)
        self._violated: dict[str, np.ndarray] = {}
        self._known: dict[int, tuple[tuple[Series, ...], _Due]] = {}
        # A rule whose statistics come every telemetry.stats_every steps is not blind before they came.
        self._waiting = {
            name for name, check in self._checks.items() if not (reads_tensors and check.reads_tensors)
        }

    def look(self, values: StepValues) -> tuple[Alert, ...]:
        """The alerts of a logging step; steps ascend."""
        if not self._checks or not len(values):
            return ()
        columns = self._table.columns(values)
        self._count += 1
        found = []
        due = self._due(values.series, columns)
        with np.errstate(invalid="ignore"):
            calm = bool(((values.values >= due.least) & (values.values <= due.most)).all())
        for name in due.rules:
            check = self._checks[name]
            # A step without the rule's statistics says nothing about whether a tensor keeps it.
            self._looks[name] += 1
            if calm and name in due.quiet and not check.sees(columns):
                continue
            finding = check.check(columns)
            new = self._new(name, finding.violated)
            if new.any():
                found.append(self._alert(name, values.step, finding, new, check.limit))
        if self._count == PATIENCE:
            self.report_blind()
        return tuple(found)

    def _due(self, series: tuple[Series, ...], columns: Columns) -> _Due:
        """Which rules have what they need, and where nothing violates those that can say so: the same in
        every step with the same series.
        """
        known = self._known.get(id(series))
        if known is not None:
            return known[1]
        rules = tuple(name for name, check in self._checks.items() if check.applies(columns))
        self._waiting.difference_update(rules)
        least, most = np.full(len(series), -np.inf), np.full(len(series), np.inf)
        found = {name: self._checks[name].ranges(columns) for name in rules}
        ranges = {name: quiet for name, quiet in found.items() if quiet is not None}
        for place, one in enumerate(series):
            for quiet in ranges.values():
                if one.stat in quiet:
                    low, high = quiet[one.stat]
                    least[place], most[place] = max(least[place], low), min(most[place], high)
        if len(self._known) >= _KEPT:
            self._known.clear()
        due = _Due(rules, frozenset(ranges), least, most)
        self._known[id(series)] = (series, due)
        return due

    def report_blind(self) -> None:
        """Say once which rules never had the statistics they need."""
        if not self._count:
            return
        for name in sorted(self._waiting):
            if self._checks[name].without:
                logger.warning("Alert rule %s sees nothing. %s", name, self._checks[name].without)
        self._waiting.clear()

    def forget(self) -> None:
        """Training goes on from an earlier step: what is violated is reported anew."""
        self._violated.clear()
        for check in self._checks.values():
            check.forget()

    def _new(self, name: str, violated: np.ndarray) -> np.ndarray:
        """Which operands began to violate the rule: they kept it in `quiet` steps that had what it needs."""
        if not violated.any():
            return violated
        never = -self._config.quiet - 1
        last = self._violated.get(name, np.zeros(0, dtype=np.int64))
        last = np.concatenate([last, np.full(len(violated) - len(last), never, dtype=np.int64)])
        new: np.ndarray = violated & (self._looks[name] - last > self._config.quiet)
        last[violated] = self._looks[name]
        self._violated[name] = last
        return new

    def _alert(self, name: str, step: int, finding: Finding, new: np.ndarray, limit: float) -> Alert:
        severity = finding.value if finding.severity is None else finding.severity
        rows = np.flatnonzero(new)
        rows = rows[np.argsort(-np.nan_to_num(severity[rows], nan=0.0), kind="stable")]
        tensors = tuple(self._table.operands[row] for row in rows)
        worst = self._table.series[rows[0]]
        value = float(finding.value[rows[0]])
        rule = self._config.rules()[name]
        more = len(tensors) - 1
        message = rule.message.format(
            module=worst.module,
            tensor=worst.tensor,
            recipe=worst.recipe,
            format=worst.format,
            step=step,
            value=f"{value:.4g}",
            limit=f"{limit:g}",
            others=f" (and {more} more tensor{'s' if more > 1 else ''})" if more else "",
            window=finding.window or "all",
            advice=rule.advice.get(worst.recipe, rule.advice.get(DEFAULT_ADVICE, "")),
        )
        return Alert(step, name, rule.action, message, worst.module, worst.tensor, value, tensors)
