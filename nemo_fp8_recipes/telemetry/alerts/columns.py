"""The values of one logging step as one array a statistic, over all operands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from nemo_fp8_recipes.telemetry.rows import Rows
from nemo_fp8_recipes.telemetry.series import WHATIF, Series, StepValues

__all__ = ["Columns", "OperandTable"]

HISTORY = "amax_history"


class _Place(NamedTuple):
    """Where the values of one statistic are: row of the operand table, and position in the step's values."""

    rows: np.ndarray
    positions: np.ndarray


class OperandTable:
    """The operands seen so far, each in a row of its own that it keeps.

    Attributes:
        operands: (module, tensor) by row.
        series: one series of the operand, with its recipe and format of the last step, by row.
    """

    def __init__(self) -> None:
        self.operands: list[tuple[str, str]] = []
        self.series: list[Series] = []
        self._rows: dict[tuple[str, str], int] = {}
        self._known: tuple[Series, ...] = ()
        self._windowed: tuple[Series, ...] = ()
        self._places: dict[str, _Place] = {}
        self._present: dict[str, np.ndarray] = {}
        self._recipes: dict[str, np.ndarray] = {}
        self._formats: dict[str, tuple[int, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self.operands)

    def columns(self, values: StepValues) -> Columns:
        if values.series is not self._known and values.series != self._known:
            self._learn(values.series)
        self._known = values.series  # the same object next time, where there is one
        windows = values.windows
        names = windows.names if isinstance(windows, Rows) else tuple(windows)
        if names is not self._windowed and names != self._windowed:
            for series in names:
                self.row(series)
        self._windowed = names
        return Columns(self, values, self._places)

    def present(self, stat: str) -> np.ndarray:
        """bool (operands,): which had the statistic in the last step. Not written."""
        known = self._present.get(stat)
        if known is None or len(known) != len(self):
            known = self._present[stat] = np.zeros(len(self), dtype=bool)
            if stat in self._places:
                known[self._places[stat].rows] = True
            known.flags.writeable = False
        return known

    def of_recipe(self, recipe: str) -> np.ndarray:
        """bool (operands,): which were quantised by `recipe` in the last step."""
        known = self._recipes.get(recipe)
        if known is None or len(known) != len(self):
            known = np.asarray([series.recipe == recipe for series in self.series], dtype=bool)
            self._recipes[recipe] = known
        return known

    def of_format(self, name: str, values: Mapping[str, float], otherwise: float) -> np.ndarray:
        """float64 (operands,): the value of each operand's element format.

        Args:
            name: of the table `values`, which is looked at once for the same operands.
        """
        known = self._formats.get(name)
        if known is None or known[0] != len(self):
            found = [values.get(series.format, otherwise) for series in self.series]
            known = self._formats[name] = (len(self), np.asarray(found, dtype=np.float64))
        return known[1]

    def _learn(self, series: Sequence[Series]) -> None:
        found: dict[str, tuple[list[int], list[int]]] = {}
        for position, one in enumerate(series):
            rows, positions = found.setdefault(one.stat, ([], []))
            rows.append(self.row(one))
            positions.append(position)
        self._places = {
            stat: _Place(np.asarray(rows, dtype=np.int64), np.asarray(positions, dtype=np.int64))
            for stat, (rows, positions) in found.items()
        }
        self._present, self._recipes, self._formats = {}, {}, {}

    def row(self, series: Series) -> int:
        """The row of the operand; a new one where it has none."""
        key = (series.module, series.tensor)
        row = self._rows.get(key)
        if row is None:
            row = self._rows[key] = len(self.operands)
            self.operands.append(key)
            self.series.append(series)
        elif not series.stat.startswith(f"{WHATIF}/"):  # such a series names the recipe that it asks about
            self.series[row] = series
        return row


class Columns:
    """One step's statistics by operand row."""

    def __init__(
        self,
        table: OperandTable,
        values: StepValues,
        places: dict[str, _Place],
    ) -> None:
        self.table = table
        self.step = values.step
        self._windows = values.windows
        self._values = values.values
        self._places = places
        self._columns: dict[str, np.ndarray] = {}

    def has(self, stat: str) -> bool:
        return stat in self._places

    def present(self, stat: str) -> np.ndarray:
        """bool (operands,): which have the statistic in this step. Rules share it: it is not written."""
        return self.table.present(stat)

    def get(self, stat: str) -> np.ndarray:
        """float64 (operands,) of a statistic; NaN where there is none. Rules share it: it is not written."""
        column = self._columns.get(stat)
        if column is None:
            column = self._columns[stat] = np.full(len(self.table), np.nan)
            if stat in self._places:
                place = self._places[stat]
                column[place.rows] = self._values[place.positions]
            column.flags.writeable = False
        return column

    def frozen(self) -> tuple[list[int], int]:
        """Operands with an Inf in their amax history, and the length of the longest history."""
        windows = self._windows
        if isinstance(windows, Rows) and windows.names[0].stat == HISTORY:
            matrix = windows.matrix
            # One number says of most steps that there is none: an Inf or a NaN would be in the sum.
            with np.errstate(over="ignore", invalid="ignore"):
                finite = np.isfinite(matrix.sum())
            if finite:
                return [], matrix.shape[1]
        histories = {series: window for series, window in windows.items() if series.stat == HISTORY}
        rows = [self.table.row(series) for series, window in histories.items() if np.isinf(window).any()]
        return rows, max(map(len, histories.values()), default=0)

    def amax(self) -> np.ndarray:
        """float64 (operands,): the amax, or its bound where only that is known. Not written."""
        if not self.has("amax_bound"):
            return self.get("amax")
        if not self.has("amax"):
            return self.get("amax_bound")
        return np.where(self.present("amax"), self.get("amax"), self.get("amax_bound"))
