"""Several parts as one: rows of all of them in the order of series and step, a piece at a time.

Parts are read by module: the row groups that hold some modules, of every part, are sorted together and given
on, so that memory does not grow with the size of the parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nemo_fp8_recipes.telemetry.store.table import NAMES, SCHEMA, STORED
from nemo_fp8_recipes.telemetry.store.windows import rejoined

__all__ = ["LAST", "merged", "module_range", "name_range"]

PIECE_ROWS = 1 << 21
"""Rows that are sorted together, about: with 40 bytes a row, 80 MB."""


def merged(paths: Sequence[Path], *, last_step: int | None = None) -> Iterator[pa.Table]:
    """The rows of parts as `STORED`, sorted by series and step, in pieces. A window that was the first of its
    series in a part continues the one before it, where it can.

    Args:
        paths: parts of any schema version, whose steps ascend from one to the next.
        last_step: leave out the rows of later steps.
    """
    files = [pq.ParquetFile(path) for path in paths]
    try:
        ranges = [
            [module_range(file.metadata, group) for group in range(file.num_row_groups)] for file in files
        ]
        below: str | None = None
        for until in _cuts(files, ranges):
            tables = []
            for file, groups in zip(files, ranges, strict=True):
                wanted = [
                    number
                    for number, (first, last) in enumerate(groups)
                    if first <= until and (below is None or last > below)
                ]
                if wanted:
                    table = _as_stored(file.read_row_groups(wanted))
                    tables.append(_between(table, below, until, last_step))
            piece = _sorted(pa.concat_tables(tables)) if tables else STORED.empty_table()
            if len(piece):
                yield piece
            below = until
    finally:
        for file in files:
            file.close()


def module_range(metadata: pq.FileMetaData, group: int) -> tuple[str, str]:
    """First and last module of a row group."""
    return name_range(metadata, group, "module") or ("", LAST)


def name_range(metadata: pq.FileMetaData, group: int, name: str) -> tuple[str, str] | None:
    """First and last of a name column in a row group; None where the file does not say."""
    statistics = metadata.row_group(group).column(SCHEMA.get_field_index(name)).statistics
    if statistics is None or not statistics.has_min_max:
        return None
    return str(statistics.min), str(statistics.max)


def _as_stored(table: pa.Table) -> pa.Table:
    """The rows of a part in the columns of this version."""
    if "since" not in table.schema.names:
        table = table.rename_columns({"values": "newest"})
        table = table.append_column("since", pa.nulls(len(table), STORED.field("since").type))
    return table.select(STORED.names).cast(STORED)


LAST = "\U0010ffff"
"""A name after all others."""


def _cuts(files: Sequence[pq.ParquetFile], ranges: Sequence[Sequence[tuple[str, str]]]) -> Iterator[str]:
    """Last modules of the pieces, ascending."""
    ends = sorted(
        (last, file.metadata.row_group(number).num_rows)
        for file, groups in zip(files, ranges, strict=True)
        for number, (_, last) in enumerate(groups)
    )
    rows = 0
    for position, (last, count) in enumerate(ends):
        rows += count
        at_end = position + 1 == len(ends)
        if at_end or (rows >= PIECE_ROWS and ends[position + 1][0] != last):
            yield last
            rows = 0


def _between(table: pa.Table, below: str | None, until: str, last_step: int | None) -> pa.Table:
    """The rows of modules after `below` up to `until`."""
    column = table.column("module").unify_dictionaries().combine_chunks()
    names = column.dictionary.to_pylist()
    inside = np.asarray([(below is None or name > below) and name <= until for name in names], dtype=bool)
    keep = inside[column.indices.to_numpy()] if len(names) else np.zeros(0, dtype=bool)
    if last_step is not None:
        keep &= table.column("step").to_numpy() <= last_step
    return table if keep.all() else table.filter(pa.array(keep))


def _sorted(table: pa.Table) -> pa.Table:
    """Rows by series and step; those of one series come in the order of their steps already."""
    table = table.unify_dictionaries().combine_chunks()
    key = np.zeros(len(table), dtype=np.int64)
    for name in NAMES:
        column = table.column(name).combine_chunks()
        names = column.dictionary.to_pylist()
        places = np.empty(len(names), dtype=np.int64)
        places[sorted(range(len(names)), key=names.__getitem__)] = np.arange(len(names))
        key = key * len(names) + places[column.indices.to_numpy()]
    order = np.argsort(key, kind="stable")
    windows = ["newest", "since"]
    if table.column("newest").null_count == len(table):
        taken = table.drop_columns(windows).take(pa.array(order))
        columns = tuple(pa.nulls(len(table), STORED.field(name).type) for name in windows)
    else:
        taken = table.take(pa.array(order)).combine_chunks()
        key = key[order]
        same = np.concatenate([[False], key[1:] == key[:-1]])
        newest, since = (taken.column(name).combine_chunks() for name in windows)
        columns = rejoined(newest, since, taken.column("step").to_numpy(), same)
        taken = taken.drop_columns(windows)
    for name, column in zip(windows, columns, strict=True):
        taken = taken.append_column(STORED.field(name), column)
    return taken
