"""Values of logging steps made by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

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


def write_version_1(run_dir: Path, steps: Sequence[StepValues], **options: Any) -> None:
    """A part as releases before schema version 2 wrote it: every window whole, in a column `values`."""
    name = pa.dictionary(pa.int32(), pa.string())
    windows = pa.list_(pa.field("element", pa.float32(), nullable=False))
    names = ("module", "tensor", "stat", "recipe", "format")
    schema = pa.schema(
        [
            pa.field("step", pa.int64(), nullable=False),
            *(pa.field(one, name, nullable=False) for one in names),
            pa.field("value", pa.float32()),
            pa.field("values", windows),
        ],
        metadata={
            b"nemo_fp8_recipes.telemetry": json.dumps({"schema_version": 1, **METADATA}).encode(),
        },
    )
    rows = []
    for values in steps:
        for one, value in zip(values.series, values.values.tolist(), strict=True):
            rows.append((*(getattr(one, key) for key in names), values.step, value, None))
        for one, window in values.windows.items():
            rows.append((*(getattr(one, key) for key in names), values.step, None, window.tolist()))
    rows.sort(key=lambda row: row[:6])
    columns = dict(zip((*names, "step", "value", "values"), map(list, zip(*rows, strict=True)), strict=True))
    table = pa.table({field.name: pa.array(columns[field.name]) for field in schema}).cast(schema)
    first, last = steps[0].step, steps[-1].step
    directory = run_dir / "telemetry"
    directory.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, directory / f"steps-{first:010d}-{last:010d}.parquet", **options)
