"""The store's table: its schema, and the conversion from the values of steps.

Rows are sorted by series and then by step. A series is then one contiguous piece, the name columns are long
runs that cost nothing, and a history window, which overlaps almost wholly with the one before it, lies next
to that and is stored as what is new in it (`windows.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from nemo_fp8_recipes.telemetry.rows import Rows
from nemo_fp8_recipes.telemetry.series import Series, StepValues
from nemo_fp8_recipes.telemetry.store.windows import TYPE, Entries, continued, continued_by_series

__all__ = [
    "METADATA_KEY",
    "NAMES",
    "SCHEMA",
    "SCHEMA_VERSION",
    "STORED",
    "SeriesIndex",
    "metadata_of",
    "schema_with",
    "to_table",
]

SCHEMA_VERSION = 2
METADATA_KEY = b"nemo_fp8_recipes.telemetry"
NAMES = ("module", "tensor", "stat", "recipe", "format")
"""The columns that name a series, in the order in which rows are sorted; `step` comes after them."""

_NAME = pa.dictionary(pa.int32(), pa.string())

SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("module", _NAME, nullable=False),
        pa.field("tensor", _NAME, nullable=False),
        pa.field("stat", _NAME, nullable=False),
        pa.field("recipe", _NAME, nullable=False),
        pa.field("format", _NAME, nullable=False),
        pa.field("value", pa.float32()),
        pa.field("values", TYPE),
    ]
)
"""Columns that a reader gets, and that files of version 1 have; docs/schemas/telemetry.md says what they
mean.
"""

STORED = pa.schema(
    [
        *list(SCHEMA)[:-1],
        pa.field("newest", TYPE),
        pa.field("since", pa.int64()),
    ]
)
"""Columns of a file: windows as what is new in them, see `windows.py`."""


def schema_with(metadata: Mapping[str, Any]) -> pa.Schema:
    """`STORED` carrying schema version and `metadata` as JSON under `METADATA_KEY`."""
    content = {**metadata, "schema_version": SCHEMA_VERSION}
    return STORED.with_metadata({METADATA_KEY: json.dumps(content, sort_keys=True).encode()})


def metadata_of(schema: pa.Schema) -> dict[str, Any]:
    """What `schema_with` was given, and the schema version.

    Raises:
        KeyError, ValueError: it is no schema of ours.
    """
    found: dict[str, Any] = json.loads((schema.metadata or {})[METADATA_KEY])
    return found


class Grid(NamedTuple):
    """The rows of steps that all hold the same series: of each series, one a step.

    Attributes:
        order: int64 (series,), places in the step's numbers and, behind them, its windows, in the order of
            the rows.
        windowed: bool (series,), in this order, whether it is a window.
        names: the columns `NAMES`.
    """

    order: np.ndarray
    windowed: np.ndarray
    names: list[pa.DictionaryArray]


class SeriesIndex:
    """The series that a writer has seen, each with its place in the order of the rows.

    Steps mostly hold the same series: their order is worked out once.
    """

    _KEPT = (
        8  # different sets of series that may take turns, such as those of the cheap and the dear statistics
    )

    def __init__(self) -> None:
        self._series: list[Series] = []
        self._numbers: dict[Series, int] = {}
        self._known: list[tuple[tuple[Series, ...], np.ndarray]] = []
        self._ordered = 0
        self._ranks = np.zeros(0, dtype=np.int32)
        self._sorted: list[Series] = []
        self._codes: list[tuple[np.ndarray, pa.Array]] = []
        self._grid: tuple[tuple[np.ndarray, np.ndarray], int, Grid | None] | None = None

    def numbers(self, series: tuple[Series, ...]) -> np.ndarray:
        """int32 (len(series),): a number for each, which it keeps."""
        for known, numbers in self._known:
            if known is series or known == series:
                return numbers
        for one in series:
            if one not in self._numbers:
                self._numbers[one] = len(self._series)
                self._series.append(one)
        found = np.fromiter((self._numbers[one] for one in series), dtype=np.int32, count=len(series))
        self._known = [(series, found), *self._known[: self._KEPT - 1]]
        return found

    def ranks(self) -> np.ndarray:
        """int32: place in the order of the rows, by number. Changes when new series appear."""
        if self._ordered != len(self._series):
            self._ordered = len(self._series)
            order = sorted(range(len(self._series)), key=self._series.__getitem__)
            self._ranks = np.empty(len(order), dtype=np.int32)
            self._ranks[order] = np.arange(len(order), dtype=np.int32)
            self._sorted = [self._series[index] for index in order]
            self._codes = [_encoded([getattr(one, name) for one in self._sorted]) for name in NAMES]
            self._grid = None
        return self._ranks

    def names(self, ranks: np.ndarray) -> list[pa.DictionaryArray]:
        """The columns `NAMES` of rows whose series have these ranks."""
        return [
            pa.DictionaryArray.from_arrays(pa.array(codes[ranks]), dictionary)
            for codes, dictionary in self._codes
        ]

    def grid(self, numbers: np.ndarray, windowed: np.ndarray, steps: int) -> Grid | None:
        """The rows of so many steps that hold these series, as numbers and as windows; None where one of them
        comes twice in a step. The same as the last time, mostly.

        Args:
            numbers, windowed: what `numbers` gave.
        """
        known = self._grid
        if known is not None and known[0][0] is numbers and known[0][1] is windowed and known[1] == steps:
            return known[2]
        ranks = self.ranks()[np.concatenate([numbers, windowed])]
        order = np.argsort(ranks, kind="stable")
        ranks = ranks[order]
        found = None
        if (np.diff(ranks) > 0).all():
            found = Grid(order, order >= len(numbers), self.names(np.repeat(ranks, steps)))
        self._grid = ((numbers, windowed), steps, found)
        return found


def to_table(steps: Sequence[StepValues], schema: pa.Schema, index: SeriesIndex | None = None) -> pa.Table:
    """The rows of some steps, sorted by `NAMES` and step. The first row of a windowed series is whole.

    Args:
        steps: ascending.
        schema: from `schema_with`.
        index: series known from earlier calls; what this call sees is added.
    """
    index = index if index is not None else SeriesIndex()
    numbers = [index.numbers(values.series) for values in steps]
    windowed = [index.numbers(_names(values.windows)) for values in steps]
    ranks = index.ranks()
    if steps and all(one is numbers[0] for one in numbers) and all(one is windowed[0] for one in windowed):
        grid = index.grid(numbers[0], windowed[0], len(steps))
        if grid is not None:
            return pa.Table.from_arrays(_of_grid(grid, windowed[0], steps), schema=schema)
    scalars = _Rows.of([ranks[one] for one in numbers], [v.step for v in steps], [v.values for v in steps])
    if not any(len(one) for one in windowed):
        order = scalars.order()
        rank, step, value = scalars.rank[order], scalars.step[order], pa.array(scalars.value[order])
        lists = _no_windows(len(order))
    else:
        rank, step, value, lists = _with_windows(scalars, windowed, ranks, steps)
    columns = [pa.array(step), *index.names(rank), value, *lists]
    return pa.Table.from_arrays(columns, schema=schema)


def _of_grid(grid: Grid, series: np.ndarray, steps: Sequence[StepValues]) -> list[pa.Array]:
    """The columns of steps that hold the same series.

    Args:
        series: numbers of the windowed ones.
    """
    every = np.asarray([values.step for values in steps], dtype=np.int64)
    scalars = len(grid.order) - len(series)
    found = np.full((len(steps), len(grid.order)), np.nan, dtype=np.float32)
    for row, values in zip(found, steps, strict=True):
        row[:scalars] = values.values
    value = found[:, grid.order].T.reshape(-1)
    step = pa.array(np.tile(every, len(grid.order)))
    if not len(series):
        return [step, *grid.names, pa.array(value), *_no_windows(len(value))]
    order = grid.order[grid.windowed] - scalars
    stored = continued_by_series(series, every.tolist(), [values.windows for values in steps], order)
    there = np.repeat(grid.windowed, len(steps))
    return [step, *grid.names, pa.array(value, mask=there), *_window_columns(there, stored)]


def _names(windows: Mapping[Series, np.ndarray]) -> tuple[Series, ...]:
    return windows.names if isinstance(windows, Rows) else tuple(windows)


def _no_windows(rows: int) -> list[pa.Array]:
    return [pa.nulls(rows, STORED.field(name).type) for name in ("newest", "since")]


class _Rows:
    """Rows before they are sorted: rank of the series, step, value."""

    def __init__(self, rank: np.ndarray, step: np.ndarray, value: np.ndarray) -> None:
        self.rank = rank
        self.step = step
        self.value = value

    @classmethod
    def of(cls, ranks: Sequence[np.ndarray], steps: Sequence[int], values: Sequence[np.ndarray]) -> _Rows:
        lengths = [len(rank) for rank in ranks]
        return cls(
            np.concatenate([np.zeros(0, dtype=np.int32), *ranks]),
            np.repeat(np.asarray(steps, dtype=np.int64), lengths),
            np.concatenate([np.zeros(0, dtype=np.float32), *values]).astype(np.float32, copy=False),
        )

    def order(self) -> np.ndarray:
        """Positions of the rows in the order of series and, as the steps ascend, step."""
        return np.argsort(self.rank, kind="stable")


def _with_windows(
    scalars: _Rows, series: Sequence[np.ndarray], ranks: np.ndarray, steps: Sequence[StepValues]
) -> tuple[np.ndarray, np.ndarray, pa.Array, list[pa.Array]]:
    """Scalar rows and windows together: rank, step and value of every row, sorted, and the columns of the
    windows.

    Args:
        series: numbers of the windowed series of each step.
        ranks: by number.
    """
    stored = continued(series, [values.step for values in steps], [values.windows for values in steps])
    nan = [np.full(len(one), np.nan, dtype=np.float32) for one in series]
    others = _Rows.of([ranks[one] for one in series], [values.step for values in steps], nan)
    rank = np.concatenate([scalars.rank, others.rank])
    step = np.concatenate([scalars.step, others.step])
    value = np.concatenate([scalars.value, others.value])
    # A series has either numbers or windows, so its rows stay in the order of the steps.
    order = np.argsort(rank, kind="stable")
    number = order - len(scalars.rank)  # of the window; negative for a scalar row
    window = number >= 0
    columns = _window_columns(window, stored.at(number[window]))
    return rank[order], step[order], pa.array(value[order], mask=window), columns


def _encoded(names: Sequence[str]) -> tuple[np.ndarray, pa.Array]:
    """A dictionary column: int32 codes and the names they stand for, sorted."""
    unique = sorted(set(names))
    position = {name: index for index, name in enumerate(unique)}
    codes = np.fromiter((position[name] for name in names), dtype=np.int32, count=len(names))
    return codes, pa.array(unique, type=pa.string())


def _window_columns(there: np.ndarray, stored: Entries) -> list[pa.Array]:
    """The columns of the windows: row i holds the next of `stored` where `there[i]`, else null."""
    since = np.full(len(there), -1, dtype=np.int64)
    since[there] = stored.since
    return [_lists(there, stored), pa.array(since, mask=since < 0)]


def _lists(there: np.ndarray, entries: Entries) -> pa.ListArray:
    """The column `newest`."""
    lengths = np.zeros(len(there), dtype=np.int64)
    lengths[there] = entries.lengths
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(entries.flat), type=TYPE, mask=pa.array(~there)
    )
