"""Reading the store, also while a run is still writing it."""

from __future__ import annotations

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
from nemo_fp8_recipes.telemetry.store.merge import module_range
from nemo_fp8_recipes.telemetry.store.table import METADATA_KEY, SCHEMA, SCHEMA_VERSION

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
    """The wanted rows of one part."""

    def load() -> pa.Table:
        with pq.ParquetFile(part.path) as file:
            _checked(part, file.metadata.metadata)
            groups = list(range(file.num_row_groups))
            if "module" in wanted:
                groups = [
                    group
                    for group in groups
                    if _may_hold(wanted["module"], *module_range(file.metadata, group))
                ]
            if not groups:
                return SCHEMA.empty_table()
            table = file.read_row_groups(groups, use_threads=False)
        table = table.select(SCHEMA.names).cast(SCHEMA)
        keep = np.ones(len(table), dtype=bool)
        for name, names in wanted.items():
            column = table.column(name).unify_dictionaries().combine_chunks()
            chosen = np.asarray([value in names for value in column.dictionary.to_pylist()], dtype=bool)
            keep &= chosen[column.indices.to_numpy()] if len(chosen) else False
        if part.first < first or part.last > last:
            step = table.column("step").to_numpy()
            keep &= (step >= first) & (step <= last)
        return table if keep.all() else table.filter(pa.array(keep))

    return _guarded(part, load)


def _may_hold(names: frozenset[str], first: str, last: str) -> bool:
    return any(first <= name <= last for name in names)


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
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ReportError(
            f"{part.path} is damaged: {error}.",
            value=str(part.path),
            hint="Move it away to read the rest of the run.",
        ) from error
