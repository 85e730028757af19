"""Writing the store: new parts, merging, truncation. One process writes a store at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nemo_fp8_recipes.telemetry.series import StepValues
from nemo_fp8_recipes.telemetry.store.files import DIRECTORY, Part, all_parts, part_name, parts
from nemo_fp8_recipes.telemetry.store.merge import merged
from nemo_fp8_recipes.telemetry.store.table import NAMES, SeriesIndex, metadata_of, schema_with, to_table

__all__ = ["StoreWriter"]

_MERGE = 16
"""Neighbouring parts of about the same size that are merged into one."""
_SIMILAR = 4
"""The largest of them may be this many times the smallest; merging makes them `_MERGE` times as large."""
_MERGED_BYTES = 256 << 20
"""Parts are not merged beyond this size on disk."""
_ROW_GROUPS = 1 << 10
_ROW_GROUP_SIZES = (1 << 13, 1 << 16)
"""Row groups of a part, about, and the least and most rows of one. A reader of one series reads one or two of
every part: the more there are the less it reads, and the longer it takes to know which.
"""
_IN_MEMORY_BYTES = 16 << 20
"""Of a table whose part is put together in memory before it is written."""


class StoreWriter:
    """Appends parts to the store of a run.

    `write` and `merge_once` may run in two threads: merging touches parts that are there already. Nothing
    else may run beside `truncate_after`.

    Args:
        run_dir: the run directory; `telemetry/` in it is created with the first part.
        metadata: JSON-able facts kept in every part.
    """

    def __init__(self, run_dir: Path, metadata: Mapping[str, Any]) -> None:
        self._run_dir = run_dir
        self._schema = schema_with(metadata)
        self._index = SeriesIndex()

    def write(self, steps: Sequence[StepValues]) -> None:
        """Write `steps`, ascending and later than everything in the store, as one part. Atomic."""
        steps = [values for values in steps if len(values)]
        if steps:
            table = to_table(steps, self._schema, self._index)
            self._put(
                [table],
                steps[0].step,
                steps[-1].step,
                self._schema,
                rows=len(table),
                in_memory=table.nbytes <= _IN_MEMORY_BYTES,
            )

    def compact(self) -> None:
        """Merge where many neighbouring parts of about the same size have gathered, so that a long run has
        few files. A reader sees the old parts or the new one.
        """
        while self.merge_once():
            pass

    def mergeable(self) -> bool:
        """Whether there is something for `compact` to do."""
        return bool(_mergeable(parts(self._run_dir)))

    def merge_once(self) -> bool:
        """Merge one such group; False where there is none."""
        group = _mergeable(parts(self._run_dir))
        if not group:
            return False
        # The metadata of the newest of them holds for the range, as `info` reads it.
        schema = _schema_of(group[-1].path)
        paths = [part.path for part in group]
        rows = sum(pq.read_metadata(path).num_rows for path in paths)
        self._put(merged(paths), group[0].first, group[-1].last, schema, rows=rows)
        for part in group:
            part.path.unlink()
        return True

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
                schema = _schema_of(part.path)
                # The name must not say more than there is: another part may begin after the last row kept.
                last = _last_step(part.path, step)
                rows = pq.read_metadata(part.path).num_rows
                self._put(merged([part.path], last_step=step), part.first, last, schema, rows=rows)
            part.path.unlink()
        for leftover in directory.glob(".steps-*"):
            leftover.unlink()

    def _put(
        self,
        pieces: Iterable[pa.Table],
        first: int,
        last: int,
        schema: pa.Schema,
        *,
        rows: int,
        in_memory: bool = False,
    ) -> Part:
        """Write a part: under a hidden name, to the disk, then under its own name.

        Args:
            rows: in all pieces, about.
            in_memory: put the file together in memory first.
        """
        directory = self._run_dir / DIRECTORY
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / part_name(first, last)
        temporary = directory / f".{path.name}.{os.getpid()}"
        try:
            _write(temporary, pieces, schema, rows, in_memory=in_memory)
            temporary.replace(path)
            _to_disk(directory)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return Part(first, last, path)


def _write(path: Path, pieces: Iterable[pa.Table], schema: pa.Schema, rows: int, *, in_memory: bool) -> None:
    """Write a file and force it to the disk.

    Args:
        rows: in all pieces, about.
        in_memory: make the file in memory and write it in one go. Of a small one each of the many writes of a
            few bytes costs as much as compressing a column.
    """
    group = _row_group_size(rows)
    memory = pa.BufferOutputStream() if in_memory else None
    with pq.ParquetWriter(
        path if memory is None else memory,
        schema,
        compression="zstd",
        use_dictionary=list(NAMES),
        # By which row groups are chosen: nothing to choose from in a part of one.
        write_statistics=["module", "tensor", "stat", "step"] if rows > group else False,
        column_encoding={
            "step": "DELTA_BINARY_PACKED",
            "value": "BYTE_STREAM_SPLIT",
            "newest.list.element": "BYTE_STREAM_SPLIT",
            "since": "DELTA_BINARY_PACKED",
        },
    ) as writer:
        for piece in pieces:
            table = piece.replace_schema_metadata(schema.metadata)
            writer.write_table(table, row_group_size=group)
    if memory is None:
        _to_disk(path)
        return
    with path.open("wb", buffering=0) as file:
        left = memoryview(memory.getvalue())
        while left:
            left = left[file.write(left) :]
        os.fsync(file.fileno())


def _schema_of(path: Path) -> pa.Schema:
    """To write the rows of a part anew: the columns of this version, the metadata of the part."""
    return schema_with(metadata_of(pq.read_schema(path)))


def _row_group_size(rows: int) -> int:
    least, most = _ROW_GROUP_SIZES
    return min(max(rows // _ROW_GROUPS, least), most)


def _mergeable(found: Sequence[Part]) -> Sequence[Part]:
    """The newest `_MERGE` neighbours of about the same size, or none."""
    sizes = [part.path.stat().st_size for part in found]
    for end in range(len(found), _MERGE - 1, -1):
        group = sizes[end - _MERGE : end]
        if max(group) <= _SIMILAR * min(group) and sum(group) <= _MERGED_BYTES:
            return found[end - _MERGE : end]
    return ()


def _last_step(path: Path, limit: int) -> int:
    """The last step up to `limit` in a part."""
    steps = pq.read_table(path, columns=["step"], filters=[("step", "<=", limit)]).column("step")
    return int(pa.compute.max(steps).as_py()) if len(steps) else limit


def _to_disk(path: Path) -> None:
    """Force a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
