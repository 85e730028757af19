"""Reading the store, also while a run is still writing it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from nemo_fp8_recipes.errors import ReportError
from nemo_fp8_recipes.telemetry.store.files import Part, parts
from nemo_fp8_recipes.telemetry.store.table import METADATA_KEY, SCHEMA, SCHEMA_VERSION

__all__ = ["info", "read", "steps"]

_ATTEMPTS = 5

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
    filters: list[tuple[str, str, Any]] = []
    for column, wanted in (("module", module), ("tensor", tensor), ("stat", stat)):
        if wanted is not None:
            filters.append((column, "in", [wanted] if isinstance(wanted, str) else list(wanted)))
    if first_step is not None:
        filters.append(("step", ">=", first_step))
    if last_step is not None:
        filters.append(("step", "<=", last_step))

    def load(found: list[Part]) -> pa.Table:
        tables = []
        for part in found:
            if first_step is not None and part.last < first_step:
                continue
            if last_step is not None and part.first > last_step:
                continue
            _check(part)
            table = _guarded(part, functools.partial(pq.read_table, part.path, filters=filters or None))
            tables.append(table.select(SCHEMA.names).cast(SCHEMA))
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
        return _check(found[-1]) if found else {}

    return _consistently(Path(run_dir), load)


def _consistently(run_dir: Path, load: Callable[[list[Part]], T]) -> T:
    """`load` on a list of parts, again if the run that is writing merged some of them meanwhile."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return load(parts(run_dir))
        except FileNotFoundError:
            continue
    return load(parts(run_dir))


def _check(part: Part) -> dict[str, Any]:
    """Metadata of a part, after checking that it is of a version we know."""
    schema = _guarded(part, functools.partial(pq.read_schema, part.path))
    try:
        metadata: dict[str, Any] = json.loads((schema.metadata or {})[METADATA_KEY])
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
