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

__all__ = ["METADATA_KEY", "SCHEMA", "SCHEMA_VERSION", "SORT_KEYS", "schema_with", "to_table"]

SCHEMA_VERSION = 1
METADATA_KEY = b"nemo_fp8_recipes.telemetry"
SORT_KEYS = ("module", "tensor", "stat", "recipe", "format", "step")

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


def to_table(steps: Sequence[StepValues], schema: pa.Schema) -> pa.Table:
    """The rows of some steps, sorted by `SORT_KEYS`."""
    series = sorted({s for values in steps for s in (*values.series, *values.windows)})
    number = {s: index for index, s in enumerate(series)}
    known: dict[int, np.ndarray] = {}  # consecutive steps usually share one tuple of series
    code_parts, step_parts, scalar_parts = [], [], []
    windows: list[np.ndarray] = []
    for values in steps:
        code = known.get(id(values.series))
        if code is None:
            code = known[id(values.series)] = _codes(values.series, number)
        windowed = _codes(tuple(values.windows), number)
        code_parts += [code, windowed]
        step_parts.append(np.full(len(code) + len(windowed), values.step, dtype=np.int64))
        scalar_parts += [values.values, np.full(len(windowed), np.nan, dtype=np.float32)]
        windows.extend(values.windows.values())
    code, step = np.concatenate(code_parts), np.concatenate(step_parts)
    # Which rows are windows: every other part. Their positions among the windows go along with the sort.
    window = np.concatenate([np.full(len(part), i % 2 == 1) for i, part in enumerate(code_parts)])
    window_number = np.cumsum(window) - 1
    order = np.argsort(code.astype(np.int64) * (int(step.max()) + 1) + step, kind="stable")
    window = window[order]
    columns = [
        pa.array(step[order]),
        *(_names([getattr(s, field) for s in series], code[order]) for field in SORT_KEYS[:-1]),
        pa.array(np.concatenate(scalar_parts)[order], mask=window),
        _lists(window, [windows[index] for index in window_number[order][window]]),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _codes(series: Sequence[Series], number: Mapping[Series, int]) -> np.ndarray:
    return np.fromiter((number[s] for s in series), dtype=np.int32, count=len(series))


def _names(names: Sequence[str], code: np.ndarray) -> pa.DictionaryArray:
    """A dictionary column: the name of each row's series."""
    unique = sorted(set(names))
    position = {name: index for index, name in enumerate(unique)}
    index = np.fromiter((position[name] for name in names), dtype=np.int32, count=len(names))
    return pa.DictionaryArray.from_arrays(pa.array(index[code]), pa.array(unique, type=pa.string()))


def _lists(window: np.ndarray, windows: Sequence[np.ndarray]) -> pa.ListArray:
    """The list column: row i holds the next of `windows` where `window[i]`, else null."""
    lengths = np.zeros(len(window), dtype=np.int64)
    lengths[window] = [len(values) for values in windows]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    flat = np.concatenate([np.zeros(0, dtype=np.float32), *windows]).astype(np.float32)
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(flat), type=SCHEMA.field("values").type, mask=pa.array(~window)
    )
