"""What launching keeps in a run directory, under `.launch/`.

    job.json              which job runs there and how it was started
    nodes/<name>.json     each node: host, GPUs, the variables it set, how it ended
    ranks/rank_<N>.json   each process: host, pid, exit status
    logs/rank_<N>.log     what each process printed; torchrun_<node>.log: torchrun itself
    stacks/rank_<N>.txt   where it was when it hung
    slurm.out job.sh      output and batch script of a SLURM job
    replaced/<N>/         runs that --overwrite put aside

The name starts with a dot because the job itself refuses to start a new run among other files.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_fp8_recipes.errors import RunDirectoryError
from nemo_fp8_recipes.training.files import atomic_write_json, writing
from nemo_fp8_recipes.training.run_directory import LAUNCH_DIRECTORY

__all__ = ["LaunchDirectory"]

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class LaunchDirectory:
    """`.launch/` of the run directory `run_dir`."""

    run_dir: Path

    @property
    def path(self) -> Path:
        return self.run_dir / LAUNCH_DIRECTORY

    @property
    def job_file(self) -> Path:
        return self.path / "job.json"

    @property
    def batch_script(self) -> Path:
        return self.path / "job.sh"

    @property
    def batch_output(self) -> Path:
        return self.path / "slurm.out"

    def node_file(self, name: str) -> Path:
        return self.path / "nodes" / f"{name}.json"

    def rank_file(self, rank: int) -> Path:
        return self.path / "ranks" / f"rank_{rank}.json"

    def log(self, rank: int) -> Path:
        return self.path / "logs" / f"rank_{rank}.log"

    def torchrun_log(self, node: str) -> Path:
        return self.path / "logs" / f"torchrun_{node}.log"

    def stacks(self, rank: int) -> Path:
        return self.path / "stacks" / f"rank_{rank}.txt"

    def create(self) -> None:
        """Make the directories. Raises `RunDirectoryError` when that is not possible."""
        for name in ("nodes", "ranks", "logs", "stacks"):
            with writing(self.path / name):
                (self.path / name).mkdir(parents=True, exist_ok=True)

    # -- records -----------------------------------------------------------------------------------------

    def read_job(self) -> dict[str, Any] | None:
        """`job.json`; None where nothing was launched. Raises `RunDirectoryError` for one that is broken."""
        record = read_record(self.job_file)
        if record is not None and record.get("schema_version") != SCHEMA_VERSION:
            raise RunDirectoryError(
                f"{self.job_file} is not of schema version {SCHEMA_VERSION}.", allowed=[SCHEMA_VERSION]
            )
        return record

    def write_job(self, record: dict[str, Any]) -> None:
        atomic_write_json(self.job_file, {"schema_version": SCHEMA_VERSION, **record})

    def ranks(self) -> list[dict[str, Any]]:
        """The records of the processes, in order of their ranks."""
        return _records(self.path / "ranks", key="rank")

    def nodes(self) -> list[dict[str, Any]]:
        """The records of the nodes, in order of their names."""
        return _records(self.path / "nodes", key="node")

    # -- locks -------------------------------------------------------------------------------------------

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """One process of any job looks at and changes the directory at a time."""
        descriptor = self._open("claim.lock")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def hold_alive(self) -> int:
        """Show, until the returned descriptor is closed or this process ends, that the job is alive here."""
        descriptor = self._open("alive.lock")
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        return descriptor

    def is_alive(self) -> bool:
        """Whether some node's process of the job that was launched here still runs."""
        return is_locked(self.path / "alive.lock")

    def _open(self, name: str) -> int:
        with writing(self.path / name):
            return os.open(self.path / name, os.O_RDWR | os.O_CREAT, 0o644)


def is_locked(path: Path) -> bool:
    """Whether another process holds a lock on `path`; a file that is not there is not locked."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    except PermissionError:
        descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def read_record(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file that is replaced atomically; None where there is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"Cannot read {path}: {error}.", value=str(path)) from error
    if not isinstance(record, dict):
        raise RunDirectoryError(f"{path} does not hold a JSON object.", value=str(path))
    return record


def _records(directory: Path, *, key: str) -> list[dict[str, Any]]:
    found = [read_record(path) for path in directory.glob("*.json") if not path.name.startswith(".")]
    return sorted((record for record in found if record is not None), key=lambda record: record[key])
