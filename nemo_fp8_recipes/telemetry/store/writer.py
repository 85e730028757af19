"""Writing the store: new parts, compaction, truncation. One process writes a store at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nemo_fp8_recipes.telemetry.series import StepValues
from nemo_fp8_recipes.telemetry.store.files import DIRECTORY, Part, all_parts, part_name, parts
from nemo_fp8_recipes.telemetry.store.table import SORT_KEYS, schema_with, to_table

__all__ = ["StoreWriter"]

_MERGE = 16
"""Parts of about the same size that are merged into one."""
_MERGED_BYTES = 128 << 20
"""Parts are not merged beyond this size on disk."""
_ROW_GROUP = 1 << 16


class StoreWriter:
    """Appends parts to the store of a run.

    Args:
        run_dir: the run directory; `telemetry/` in it is created with the first part.
        metadata: JSON-able facts kept in every part.
    """

    def __init__(self, run_dir: Path, metadata: Mapping[str, Any]) -> None:
        self._run_dir = run_dir
        self._schema = schema_with(metadata)

    def write(self, steps: Sequence[StepValues]) -> None:
        """Write `steps`, ascending and later than everything in the store, as one part. Atomic."""
        steps = [values for values in steps if len(values)]
        if steps:
            self._put(to_table(steps, self._schema), steps[0].step, steps[-1].step)

    def compact(self) -> None:
        """Merge the newest parts where many of about the same size have gathered, so that a long run has few
        files. A reader sees the old parts or the new one.
        """
        while True:
            newest = parts(self._run_dir)[-_MERGE:]
            if len(newest) < _MERGE:
                return
            sizes = [part.path.stat().st_size for part in newest]
            if max(sizes) > _MERGE * min(sizes) or sum(sizes) > _MERGED_BYTES:
                return
            table = pa.concat_tables([pq.read_table(part.path) for part in newest]).unify_dictionaries()
            self._put(_sorted(table), newest[0].first, newest[-1].last)
            for part in newest:
                part.path.unlink()

    def truncate_after(self, step: int) -> None:
        """Remove the rows of steps after `step`, and what an earlier crash left. A crash here leaves a store
        that the next call truncates.
        """
        directory = self._run_dir / DIRECTORY
        counted = parts(self._run_dir)
        for part in all_parts(self._run_dir):
            if part not in counted:
                part.path.unlink()
        for part in counted:
            if part.last <= step:
                continue
            if part.first <= step:
                table = pq.read_table(part.path, filters=[("step", "<=", step)])
                kept = table.column("step")
                if len(kept):
                    self._put(table, part.first, max(kept.to_pylist()))
            part.path.unlink()
        for leftover in directory.glob(".steps-*"):
            leftover.unlink()

    def _put(self, table: pa.Table, first: int, last: int) -> Part:
        """Write a part: under a hidden name, to the disk, then under its own name."""
        directory = self._run_dir / DIRECTORY
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / part_name(first, last)
        temporary = directory / f".{path.name}.{os.getpid()}"
        try:
            pq.write_table(
                table,
                temporary,
                row_group_size=_ROW_GROUP,
                compression="zstd",
                use_dictionary=list(SORT_KEYS[:-1]),
                column_encoding={"step": "DELTA_BINARY_PACKED", "value": "BYTE_STREAM_SPLIT"},
                store_schema=True,
            )
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return Part(first, last, path)


def _sorted(table: pa.Table) -> pa.Table:
    """Rows by series and step. Name columns are compared as text, whatever dictionary each part had."""
    keys = table.select(["step"])
    for name in SORT_KEYS[:-1]:
        keys = keys.append_column(name, table.column(name).cast(pa.string()))
    return table.take(pc.sort_indices(keys, [(name, "ascending") for name in SORT_KEYS]))
