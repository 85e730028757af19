"""Checkpoint directories: which are complete, whether one is intact, whether it fits this job. No torch."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_fp8_recipes.errors import CheckpointError
from nemo_fp8_recipes.training.files import atomic_write_json

__all__ = [
    "CompleteMarker",
    "checkpoint_path",
    "digest_files",
    "find_damage",
    "newest_checkpoint",
    "newest_complete_step",
    "prune",
    "read_marker",
    "require_intact",
    "require_same_job",
    "write_marker",
]

SCHEMA_VERSION = 1
MARKER = "complete.json"
logger = logging.getLogger(__name__)
_NAME = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True)
class CompleteMarker:
    """What `complete.json` says: the step, the job it belongs to, and each file's size and digest."""

    step: int
    job: dict[str, Any]
    versions: dict[str, str | None]
    files: dict[str, dict[str, Any]]


def checkpoint_path(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:06d}"


def _step(directory: Path) -> int | None:
    """The step that the name says; None where it is no checkpoint's."""
    match = _NAME.fullmatch(directory.name)
    return int(match.group(1)) if match else None


def _steps(checkpoints: Path) -> dict[int, Path]:
    with _reading(checkpoints):
        if not checkpoints.is_dir():
            return {}
        found = ((_step(entry), entry) for entry in checkpoints.iterdir() if entry.is_dir())
        return {step: entry for step, entry in found if step is not None}


def _complete(checkpoints: Path) -> dict[int, Path]:
    """Those with a marker. Raises `CheckpointError` where the directories cannot be read."""
    with _reading(checkpoints):
        return {step: path for step, path in _steps(checkpoints).items() if (path / MARKER).is_file()}


@contextmanager
def _reading(checkpoints: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {error.filename or checkpoints}: {error.strerror or error}.",
            key="training.resume",
            value=str(checkpoints),
        ) from error


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """The complete checkpoint of the latest step; directories without a marker are saves that never ended."""
    complete = _complete(checkpoints)
    return complete[max(complete)] if complete else None


def newest_complete_step(checkpoints: Path, *, below: int | None = None) -> int | None:
    """The step of the newest complete checkpoint, or None; `below`: of those of earlier steps."""
    complete = _complete(checkpoints)
    return max((step for step in complete if below is None or step < below), default=None)


def prune(checkpoints: Path, *, keep: int, newest: int) -> None:
    """Delete all but the `keep` newest complete checkpoints up to step `newest`, and every incomplete one.
    What cannot be read or deleted stays, with a warning: the newest one is complete, and the job can go on.
    """
    try:
        there, complete = _steps(checkpoints), _complete(checkpoints)
    except CheckpointError as error:
        logger.warning("No checkpoint was deleted: %s", error.message)
        return
    kept = {*sorted(complete)[-keep:], newest}
    for step, path in there.items():
        if step not in kept:
            try:
                # The marker goes first: a deletion cut short leaves no checkpoint that looks complete.
                (path / MARKER).unlink(missing_ok=True)
                shutil.rmtree(path)
            except OSError as error:
                logger.warning("Cannot delete the checkpoint %s: %s.", path, error.strerror or error)


def digest_files(directory: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size in bytes and BLAKE2b-128 of each file, read in pieces."""
    entries = {}
    for name in names:
        with (directory / name).open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
            entries[name] = {"bytes": file.tell(), "blake2b": digest}
    return entries


def write_marker(directory: Path, marker: CompleteMarker) -> None:
    """Declare the checkpoint in `directory` complete; nothing is written to it afterwards."""
    atomic_write_json(
        directory / MARKER,
        {
            "schema_version": SCHEMA_VERSION,
            "step": marker.step,
            "job": marker.job,
            "versions": marker.versions,
            "files": dict(sorted(marker.files.items())),
        },
    )


def read_marker(directory: Path) -> CompleteMarker:
    """The marker of a complete checkpoint. Raises `CheckpointError` when it is missing, not readable, or of
    another step than the directory's name says."""
    file = directory / MARKER
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["schema_version"] != SCHEMA_VERSION:
            raise CheckpointError(
                f"{file} is of schema version {record['schema_version']}.", allowed=[SCHEMA_VERSION]
            )
        marker = CompleteMarker(record["step"], record["job"], record["versions"], record["files"])
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} is not a complete checkpoint: its save did not end.", value=str(directory)
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {file}: {error.strerror or error}.", value=str(directory)
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        missing = f"has no {error.args[0]}" if isinstance(error, KeyError) else "is no JSON object"
        raise _corrupt(directory, f"{MARKER} {missing}") from error
    for key, kind in {"step": int, "job": dict, "versions": dict, "files": dict}.items():
        if type(record[key]) is not kind or (key == "files" and not marker.files):
            raise _corrupt(directory, f"{MARKER} has no {key}")
    for name, entry in marker.files.items():
        kinds = [type(entry.get(key)) for key in ("bytes", "blake2b")] if isinstance(entry, dict) else []
        if kinds != [int, str]:
            raise _corrupt(directory, f"{MARKER} does not say what {name} was")
    if _step(directory) not in (None, marker.step):
        raise _corrupt(directory, f"{MARKER} is of step {marker.step}")
    return marker


def _corrupt(directory: Path, damage: str) -> CheckpointError:
    step = _step(directory)
    older = newest_complete_step(directory.parent, below=step) if step is not None else None
    return CheckpointError(
        f"The checkpoint {directory} is corrupt: {damage}.",
        value=str(directory),
        hint=f"Delete that directory to go on from step {older}."
        if older is not None
        else "Delete that directory to start again: there is no older one that is complete.",
    )


def find_damage(directory: Path, expected: Mapping[str, Mapping[str, Any]]) -> str | None:
    """What is wrong with the first file that lacks its size or digest, or None when all are intact."""
    for name, entry in expected.items():
        try:
            size = (directory / name).stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes instead of {entry['bytes']}"
            if digest_files(directory, [name])[name]["blake2b"] != entry["blake2b"]:
                return f"{name} has other content than was saved"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def require_intact(directory: Path, damage: Sequence[str]) -> None:
    """Raise `CheckpointError` when `find_damage` found any on some rank."""
    if damage:
        raise _corrupt(directory, damage[0])


def require_same_job(directory: Path, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` when the checkpoint belongs to another configuration, naming what differs."""
    differing = [
        f"{key} was {saved.get(key)!r}, is {current.get(key)!r}"
        for key in sorted({*saved, *current})
        if saved.get(key) != current.get(key)
    ]
    if differing:
        more = f" (and {len(differing) - 3} more)" if len(differing) > 3 else ""
        raise CheckpointError(
            f"{directory} was saved by a job with another configuration: {'; '.join(differing[:3])}{more}.",
            key=differing[0].split(" ", 1)[0],
            value=str(directory),
            hint="Resume with the configuration it was saved with, or start a new run.",
        )
