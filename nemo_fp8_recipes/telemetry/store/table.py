"""The store's table: its schema, and the conversion from the values of steps.

Rows are sorted by series and then by step. A series is then one contiguous piece, the name columns are long
runs that cost nothing, and consecutive history windows, which overlap almost wholly, lie next to each other,
where the compressor finds the overlap.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from nemo_fp8_recipes.telemetry.series import Series, StepValues

__all__ = ["METADATA_KEY", "NAMES", "SCHEMA", "SCHEMA_VERSION", "SeriesIndex", "schema_with", "to_table"]

SCHEMA_VERSION = 1
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
        pa.field("values", pa.list_(pa.field("element", pa.float32(), nullable=False))),
    ]
)
"""Columns of version 1; docs/schemas/telemetry.md says what they mean."""


def schema_with(metadata: Mapping[str, Any]) -> pa.Schema:
    """`SCHEMA` carrying schema version and `metadata` as JSON under `METADATA_KEY`."""
    content = {"schema_version": SCHEMA_VERSION, **metadata}
    return SCHEMA.with_metadata({METADATA_KEY: json.dumps(content, sort_keys=True).encode()})


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
        return self._ranks

    def names(self, ranks: np.ndarray) -> list[pa.DictionaryArray]:
        """The columns `NAMES` of rows whose series have these ranks."""
        return [
            pa.DictionaryArray.from_arrays(pa.array(codes[ranks]), dictionary)
            for codes, dictionary in self._codes
        ]


def to_table(steps: Sequence[StepValues], schema: pa.Schema, index: SeriesIndex | None = None) -> pa.Table:
    """The rows of some steps, sorted by `NAMES` and step.

    Args:
        steps: ascending.
        schema: from `schema_with`.
        index: series known from earlier calls; what this call sees is added.
    """
    index = index if index is not None else SeriesIndex()
    numbers = [index.numbers(values.series) for values in steps]
    windowed = [index.numbers(tuple(values.windows)) for values in steps]
    ranks = index.ranks()
    scalars = _Rows.of([ranks[one] for one in numbers], [v.step for v in steps], [v.values for v in steps])
    order = scalars.order()
    if not any(len(one) for one in windowed):
        rank, step, value = scalars.rank[order], scalars.step[order], pa.array(scalars.value[order])
        lists = pa.nulls(len(order), SCHEMA.field("values").type)
    else:
        rank, step, value, lists = _with_windows(scalars, [ranks[one] for one in windowed], steps)
    columns = [pa.array(step), *index.names(rank), value, lists]
    return pa.Table.from_arrays(columns, schema=schema)


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
    scalars: _Rows, ranks: Sequence[np.ndarray], steps: Sequence[StepValues]
) -> tuple[np.ndarray, np.ndarray, pa.Array, pa.ListArray]:
    """Scalar rows and windows together: rank, step, value and window of every row, sorted."""
    windows = [window for values in steps for window in values.windows.values()]
    nan = [np.full(len(rank), np.nan, dtype=np.float32) for rank in ranks]
    others = _Rows.of(ranks, [values.step for values in steps], nan)
    rank = np.concatenate([scalars.rank, others.rank])
    step = np.concatenate([scalars.step, others.step])
    value = np.concatenate([scalars.value, others.value])
    # A series has either numbers or windows, so its rows stay in the order of the steps.
    order = np.argsort(rank, kind="stable")
    number = order - len(scalars.rank)  # of the window; negative for a scalar row
    window = number >= 0
    lists = _lists(window, [windows[position] for position in number[window]])
    return rank[order], step[order], pa.array(value[order], mask=window), lists


def _encoded(names: Sequence[str]) -> tuple[np.ndarray, pa.Array]:
    """A dictionary column: int32 codes and the names they stand for, sorted."""
    unique = sorted(set(names))
    position = {name: index for index, name in enumerate(unique)}
    codes = np.fromiter((position[name] for name in names), dtype=np.int32, count=len(names))
    return codes, pa.array(unique, type=pa.string())


def _lists(window: np.ndarray, windows: Sequence[np.ndarray]) -> pa.ListArray:
    """The list column: row i holds the next of `windows` where `window[i]`, else null."""
    lengths = np.zeros(len(window), dtype=np.int64)
    lengths[window] = [len(values) for values in windows]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    flat = np.concatenate([np.zeros(0, dtype=np.float32), *windows]).astype(np.float32)
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(flat), type=SCHEMA.field("values").type, mask=pa.array(~window)
    )
