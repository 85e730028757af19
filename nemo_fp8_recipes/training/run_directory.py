"""The directory a run writes: who may write it, what state it is in, and where its parts lie.

    run.json                 what ran and how it stands: running, finished, interrupted or failed
    config.yaml              the composed configuration
    manifest.json            what each module really did
    metrics.jsonl            one line a logged step
    telemetry/ tensorboard/  amax, scale, histories
    checkpoints/step_XXXXXX/
    .data_index/             which tokens make which sequence, of data=megatron_indexed
    .launch/                 how it was launched, logs of each rank (launch/directory.py)

One process writes a directory at a time: it holds a lock on `.lock` that the kernel releases when it ends,
however it ends.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_fp8_recipes.errors import RunDirectoryError
from nemo_fp8_recipes.training.files import atomic_write_json, atomic_write_text, writing

__all__ = ["SCHEMA_VERSION", "RunDirectory", "newest_run"]

SCHEMA_VERSION = 1
DEFAULT_PARENT = Path("runs")
RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
MANIFEST_FILE = "manifest.json"
MANIFESTS = "manifests"  # where the recipe changes: a file for every step after which the manifest was read
CHECKPOINTS = "checkpoints"
LOCK_FILE = ".lock"
_ALWAYS = {"status": str, "recipe": dict, "started": str}
"""What every `run.json` has."""
_OFTEN: dict[str, type | tuple[type, ...]] = {"resumes": list, "versions": dict, "result": (dict, type(None))}
"""What it has unless something else than a job of ours wrote it."""
DATA_INDEX = ".data_index"
LAUNCH_DIRECTORY = ".launch"
"""What is there before a run starts begins with a dot, so that it does not count as another run's."""


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def read_run(path: Path) -> dict[str, Any]:
    """`run.json` of a run directory. Raises `RunDirectoryError` when `path` holds no readable run."""
    file = path / RUN_FILE
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunDirectoryError(
            f"{path} is not a run directory: it has no {RUN_FILE}."
            if path.is_dir()
            else f"There is no directory {path}.",
            value=str(path),
            hint="nemo-fp8 runs lists those that there are.",
        ) from None
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"Cannot read {file}: {error}.", value=str(path)) from error
    version = record.get("schema_version") if isinstance(record, dict) else None
    if version != SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        raise RunDirectoryError(
            f"{file} is not of schema version {SCHEMA_VERSION}: it says {json.dumps(version)}.",
            value=str(path),
            allowed=[SCHEMA_VERSION],
            hint="A newer nemo-fp8-recipes wrote it: upgrade this one." if newer else None,
        )
    missing = [key for key, kind in _ALWAYS.items() if not isinstance(record.get(key), kind)]
    missing += [key for key, kind in _OFTEN.items() if key in record and not isinstance(record[key], kind)]
    if missing:
        raise RunDirectoryError(f"{file} is damaged: it has no {', '.join(missing)}.", value=str(path))
    return dict(record)


def newest_run(recipe: str, parent: Path = DEFAULT_PARENT) -> Path | None:
    """The run of `recipe` below `parent` that was started last, or None. Directories without a run are passed
    over; a run whose record cannot be read is an error, not a gap."""
    started = {}
    for file in sorted(parent.glob(f"*/{RUN_FILE}")):
        record = read_run(file.parent)
        if record["recipe"].get("name") == recipe:
            started[(record["started"], file.parent.name)] = file.parent
    return started[max(started)] if started else None


class RunDirectory:
    """A run directory that this process may write, locked until `close`."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock: int | None = lock
        self._record: dict[str, Any] = {}

    # -- opening -----------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: str | Path | None, recipe: str) -> RunDirectory:
        """A new run in `path`, or in `runs/<recipe>-<time>` when none is given.

        Raises:
            RunDirectoryError: `path` holds something already, is in use, or cannot be written.
        """
        directory = Path(path) if path is not None else cls.fresh_directory(recipe)
        with writing(directory):
            if path is not None and directory.exists() and not directory.is_dir():
                raise RunDirectoryError(
                    f"{directory} is a file, not a directory.", key="run_dir", value=str(path)
                )
            directory.mkdir(parents=True, exist_ok=True)
        run = cls(directory.resolve(), cls._acquire(directory))
        # Only what a start that never came to its run.json may have left does not count as content.
        content = sorted(entry.name for entry in directory.iterdir() if not entry.name.startswith("."))
        if content:
            run.close()
            what = "a run already" if RUN_FILE in content else f"other files ({', '.join(content[:3])})"
            raise RunDirectoryError(
                f"{directory} holds {what}.",
                key="run_dir",
                value=str(directory),
                hint=f"Go on with it: training.resume={directory}. Or choose another run_dir."
                if RUN_FILE in content
                else "Choose another run_dir.",
            )
        return run

    @classmethod
    def reopen(cls, path: str | Path) -> RunDirectory:
        """The existing run in `path`, to go on with it."""
        directory = Path(path)
        record = read_run(directory)
        run = cls(directory.resolve(), cls._acquire(directory))
        run._record = record
        return run

    @staticmethod
    def fresh_directory(recipe: str) -> Path:
        """A new, empty `runs/<recipe>-<time>`."""
        base = DEFAULT_PARENT / f"{recipe}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
        for number in range(1000):
            candidate = base if number == 0 else base.with_name(f"{base.name}-{number}")
            try:
                with writing(candidate):
                    candidate.parent.mkdir(parents=True, exist_ok=True)
                    candidate.mkdir()
            except RunDirectoryError as error:
                if isinstance(error.__cause__, FileExistsError) and candidate.is_dir():
                    continue  # another run started in the same second
                raise
            return candidate
        raise RunDirectoryError(f"No free name like {base}.", key="run_dir", hint="Set run_dir=PATH.")

    @staticmethod
    def _acquire(directory: Path) -> int:
        with writing(directory):
            descriptor = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise RunDirectoryError(
                    f"Cannot lock {directory}: {error.strerror}.", key="run_dir", value=str(directory)
                ) from error
            raise RunDirectoryError(
                f"{directory} is in use by another process.",
                key="run_dir",
                value=str(directory),
                hint="Wait for it to end or choose another run_dir.",
            ) from error
        return descriptor

    # -- parts -------------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def metrics_file(self) -> Path:
        return self.path / METRICS_FILE

    @property
    def record(self) -> Mapping[str, Any]:
        return self._record

    # -- state -------------------------------------------------------------------------------------------

    def start(
        self,
        *,
        command: Sequence[str],
        overrides: Sequence[str],
        recipe: Mapping[str, Any],
        device: str,
        versions: Mapping[str, str | None],
        config_yaml: str,
        resumed_at: int | None = None,
    ) -> None:
        """Write a `run.json` that says running, and `config.yaml`; a resumed run keeps when it first
        started."""
        resumes = list(self._record.get("resumes", []))
        if resumed_at is not None:
            resumes.append({"step": resumed_at, "time": _now()})
        self._write(
            {
                "schema_version": SCHEMA_VERSION,
                "status": "running",
                "command": list(command),
                "overrides": list(overrides),
                "recipe": dict(recipe),
                "device": device,
                "versions": dict(versions),
                "started": self._record.get("started") or _now(),
                "ended": None,
                "error": None,
                "resumes": resumes,
                "result": None,
            }
        )
        # After run.json, without which a directory that holds something is taken for another's.
        atomic_write_text(self.path / "config.yaml", config_yaml)

    def finish(self, result: Mapping[str, Any]) -> None:
        """The run reached its last step; `result` is what `run.json` says about it (final losses)."""
        self._end("finished", result=dict(result))

    def interrupt(self, reason: str) -> None:
        """The run was asked to stop and can be resumed."""
        self._end("interrupted", error=reason)

    def fail(self, error: BaseException) -> None:
        """The run ended by `error`. Does nothing before `start`: there is no run yet."""
        if self._record.get("status") == "running":
            self._end("failed", error=f"{type(error).__name__}: {error}")

    def _end(self, status: str, *, error: str | None = None, result: Mapping[str, Any] | None = None) -> None:
        self._write({**self._record, "status": status, "ended": _now(), "error": error, "result": result})

    def _write(self, record: dict[str, Any]) -> None:
        atomic_write_json(self.path / RUN_FILE, record)
        self._record = record

    def close(self) -> None:
        """Release the lock. Leaves no trace of a directory in which nothing was started."""
        if self._lock is None:
            return
        if not (self.path / RUN_FILE).exists():
            with contextlib.suppress(OSError):  # not empty or not ours: what is there stays
                (self.path / LOCK_FILE).unlink(missing_ok=True)
                self.path.rmdir()
        os.close(self._lock)
        self._lock = None
