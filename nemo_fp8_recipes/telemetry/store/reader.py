"""Reading the store, also while a run is still writing it."""

from __future__ import annotations

import bisect
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nemo_fp8_recipes.errors import ReportError
from nemo_fp8_recipes.telemetry.store.files import Part, parts
from nemo_fp8_recipes.telemetry.store.merge import module_range, name_range
from nemo_fp8_recipes.telemetry.store.table import METADATA_KEY, NAMES, SCHEMA, SCHEMA_VERSION, STORED
from nemo_fp8_recipes.telemetry.store.windows import DamagedWindows, pieces, whole

__all__ = ["info", "read", "steps"]

_ATTEMPTS = 5
_THREADS = 4

T = TypeVar("T")


def read(
    run_dir: str | Path,
    module: str | Iterable[str] | None = None,
    tensor: str | Iterable[str] | None = None,
    stat: str | Iterable[str] | None = None,
    *,
    first_step: int | None = None,
    last_step: int | None = None,
) -> pa.Table:
    """Rows of a run's telemetry, ordered by series and step within each part; parts ascend by step.

    Args:
        run_dir: the run directory. A run that has not written anything yet gives an empty table.
        module, tensor, stat: names to keep, one or several; None keeps all.
        first_step, last_step: steps to keep, both included.

    Returns:
        columns of `SCHEMA`; only the files and row groups that can hold such rows are read.

    Raises:
        ReportError: a file of a newer schema, or one that is damaged.
    """
    wanted = {
        name: frozenset([given] if isinstance(given, str) else given)
        for name, given in (("module", module), ("tensor", tensor), ("stat", stat))
        if given is not None
    }
    first = first_step if first_step is not None else 0
    last = last_step if last_step is not None else np.iinfo(np.int64).max

    def load(found: list[Part]) -> pa.Table:
        touched = [part for part in found if part.last >= first and part.first <= last]
        with ThreadPoolExecutor(_THREADS) as pool:
            tables = list(pool.map(lambda part: _load(part, wanted, first, last), touched))
        if not tables:
            return SCHEMA.empty_table()
        return pa.concat_tables(tables).unify_dictionaries()

    return _consistently(Path(run_dir), load)


def steps(run_dir: str | Path) -> tuple[int, int] | None:
    """First and last step in the store, None for an empty one."""
    found = parts(Path(run_dir))
    return (found[0].first, found[-1].last) if found else None


def info(run_dir: str | Path) -> dict[str, Any]:
    """Metadata of the newest part: schema_version, recipe, device, world_size, …; empty without a part."""

    def load(found: list[Part]) -> dict[str, Any]:
        if not found:
            return {}
        schema = _guarded(found[-1], functools.partial(pq.read_schema, found[-1].path))
        return _checked(found[-1], schema.metadata)

    return _consistently(Path(run_dir), load)


def _load(part: Part, wanted: Mapping[str, frozenset[str]], first: int, last: int) -> pa.Table:
    """The wanted rows of one part, windows whole."""

    def load() -> pa.Table:
        with pq.ParquetFile(part.path) as file:
            _checked(part, file.metadata.metadata)
            # By series alone, never by step: a window may continue an earlier row of its series.
            groups = row_groups(file.metadata, wanted)
            if not groups:
                return SCHEMA.empty_table()
            table = file.read_row_groups(groups, use_threads=False)
        if "since" in table.schema.names:
            if table.column("newest").null_count < len(table):
                return _expanded(table, wanted, first, last)
            nulls = pa.nulls(len(table), SCHEMA.field("values").type)
            table = table.drop_columns(["newest", "since"]).append_column("values", nulls)
        if not table.schema.equals(SCHEMA):
            table = table.select(SCHEMA.names).cast(SCHEMA)
        kept = [_kept(piece, _chosen(piece, wanted, first, last)) for piece in table.to_batches()]
        return pa.Table.from_batches(kept, schema=SCHEMA)

    return _guarded(part, load)


def _expanded(table: pa.Table, wanted: Mapping[str, frozenset[str]], first: int, last: int) -> pa.Table:
    """The wanted rows of a table of `STORED`, windows whole."""
    # First all rows of the wanted series. Of others there may be some without the ones before them.
    kept = [_kept(piece, _of_series(piece, wanted)) for piece in table.to_batches()]
    table = pa.Table.from_batches(kept, schema=table.schema).select(STORED.names).cast(STORED)
    if not len(table):
        return SCHEMA.empty_table()
    table = table.unify_dictionaries().combine_chunks()
    same = np.ones(len(table), dtype=bool)
    same[0] = False
    for name in NAMES:
        codes = table.column(name).combine_chunks().indices.to_numpy()
        same[1:] &= codes[1:] == codes[:-1]
    newest, since = (table.column(name).combine_chunks() for name in ("newest", "since"))
    step = table.column("step").to_numpy()
    found = pieces(newest, since, step, same)
    numbers = newest.is_null().to_numpy(zero_copy_only=False)
    rows = np.flatnonzero((step >= first) & (step <= last))
    plain = table.drop_columns(["newest", "since"])
    tables = [
        plain.take(pa.array(chosen)).append_column(SCHEMA.field("values"), lists)
        for chosen, lists in whole(found, rows, numbers)
    ]
    return pa.concat_tables([SCHEMA.empty_table(), *tables])


def _chosen(piece: pa.RecordBatch, wanted: Mapping[str, frozenset[str]], first: int, last: int) -> np.ndarray:
    """bool (rows,): which rows of a piece are wanted."""
    step = piece.column("step").to_numpy()
    return _of_series(piece, wanted) & (step >= first) & (step <= last)


def _of_series(piece: pa.RecordBatch, wanted: Mapping[str, frozenset[str]]) -> np.ndarray:
    """bool (rows,): which rows of a piece are of wanted series, whatever their step."""
    keep = np.ones(len(piece), dtype=bool)
    for name, names in wanted.items():
        column = piece.column(name)
        chosen = np.asarray([value in names for value in column.dictionary.to_pylist()], dtype=bool)
        keep &= chosen[column.indices.to_numpy()] if len(chosen) else False
    return keep


def _kept(piece: pa.RecordBatch, keep: np.ndarray) -> pa.RecordBatch:
    """Some rows of a piece; those of one series lie together, and are then not even copied."""
    count = int(np.count_nonzero(keep))
    start = int(keep.argmax()) if count else 0
    if keep[start : start + count].all():
        return piece.slice(start, count)
    return piece.filter(pa.array(keep))


def row_groups(metadata: pq.FileMetaData, wanted: Mapping[str, frozenset[str]]) -> list[int]:
    """The row groups that may hold wanted rows. Rows are sorted by module, tensor and statistic."""
    everything = range(metadata.num_row_groups)
    if "module" not in wanted:
        return list(everything)
    found: set[int] = set()
    for module in wanted["module"]:
        # The first group whose last module is not before this one; what follows it is asked one by one.
        begin = bisect.bisect_left(everything, module, key=lambda group: module_range(metadata, group)[1])
        for group in everything[begin:]:
            if module_range(metadata, group)[0] > module:
                break
            if _may_hold(metadata, group, wanted):
                found.add(group)
    return sorted(found)


def _may_hold(metadata: pq.FileMetaData, group: int, wanted: Mapping[str, frozenset[str]]) -> bool:
    """Whether tensors and statistics of a row group do not speak against it."""
    for name in ("tensor", "stat"):
        span = name_range(metadata, group, name)
        if name in wanted and span is not None and not any(span[0] <= one <= span[1] for one in wanted[name]):
            return False
    return True


def _consistently(run_dir: Path, load: Callable[[list[Part]], T]) -> T:
    """`load` on a list of parts, again if the run that is writing merged some of them meanwhile."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return load(parts(run_dir))
        except FileNotFoundError:
            continue
    return load(parts(run_dir))


def _checked(part: Part, found: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """Metadata of a part, after checking that it is of a version we know."""
    try:
        metadata: dict[str, Any] = json.loads((found or {})[METADATA_KEY])
        version = int(metadata["schema_version"])
    except (KeyError, ValueError) as error:
        raise ReportError(
            f"{part.path} is no telemetry of nemo_fp8_recipes: it does not name its schema version.",
            value=str(part.path),
        ) from error
    if version > SCHEMA_VERSION:
        raise ReportError(
            f"{part.path} has telemetry schema version {version}; this installation reads up to "
            f"{SCHEMA_VERSION}.",
            value=version,
            hint="Upgrade nemo_fp8_recipes.",
        )
    return metadata


def _guarded(part: Part, load: Callable[[], T]) -> T:
    try:
        return load()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, DamagedWindows, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ReportError(
            f"{part.path} is damaged: {str(error).rstrip('.')}.",
            value=str(part.path),
            hint="Move it away to read the rest of the run.",
        ) from error
