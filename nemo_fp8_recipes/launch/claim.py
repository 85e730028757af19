"""The right to use a run directory: what exists is overwritten only when asked for, and never deleted."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_fp8_recipes.errors import RunDirectoryError
from nemo_fp8_recipes.launch.directory import LaunchDirectory
from nemo_fp8_recipes.launch.plan import Job
from nemo_fp8_recipes.training.checkpoint.directory import newest_complete_step
from nemo_fp8_recipes.training.files import writing
from nemo_fp8_recipes.training.run_directory import (
    CHECKPOINTS,
    LAUNCH_DIRECTORY,
    LOCK_FILE,
    RUN_FILE,
    RunDirectory,
)

__all__ = ["Claim", "claim", "node_name", "refuse_existing", "reserve"]

_KEPT = frozenset({LAUNCH_DIRECTORY, LOCK_FILE})
_OF_A_RUN = ("nodes", "ranks", "logs", "stacks", "job.json", "job.sh", "slurm.out")


def node_name() -> str:
    """The name of this node, as SLURM calls it where there is one."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


@dataclass
class Claim:
    """A run directory that this node's process may use for `job`."""

    directory: LaunchDirectory
    resume: bool
    """Whether the job goes on with what the directory holds."""
    attempt: int = 1
    """Which start of jobs in this directory it is, counted from 1; the same on all nodes."""
    notes: list[str] = field(default_factory=list)
    """What the user should know about how the directory was found."""
    _alive: int | None = None

    def release(self) -> None:
        """No longer show that the job is alive on this node."""
        if self._alive is not None:
            os.close(self._alive)
            self._alive = None


def reserve(
    job: Job, command: Sequence[str], *, resume: bool, overwrite: bool, extra: dict[str, Any] | None = None
) -> Claim:
    """Prepare the run directory of a job that a batch system starts later, and write its `job.json`.

    Raises:
        RunDirectoryError: it holds something and neither `resume` nor `overwrite` is given, it is in use, or
        it cannot be written.
    """
    return _prepare(
        job, command, resume=resume, overwrite=overwrite, requeued=False, state="submitted", extra=extra
    )


def claim(
    job: Job,
    command: Sequence[str],
    *,
    resume: bool,
    overwrite: bool,
    requeued: bool,
    extra: dict[str, Any] | None = None,
) -> Claim:
    """Claim the run directory for the processes that this node starts now; call `release` at their end.

    Args:
        requeued: the batch system starts this job again: it goes on with its own run.

    Raises:
        RunDirectoryError: as `reserve`.
    """
    return _prepare(
        job, command, resume=resume, overwrite=overwrite, requeued=requeued, state="started", extra=extra
    )


def _prepare(
    job: Job,
    command: Sequence[str],
    *,
    resume: bool,
    overwrite: bool,
    requeued: bool,
    state: str,
    extra: dict[str, Any] | None,
) -> Claim:
    _refuse_foreign(job.run_dir)
    directory = LaunchDirectory(job.run_dir)
    directory.create()
    with directory.exclusive():
        record = before = directory.read_job()
        alive = directory.is_alive()
        same_job = record is not None and record["job_id"] == job.id
        # Another node of this job was here first, or the batch system's submission was.
        joins = same_job and record is not None and (alive or requeued or record["state"] == "submitted")
        result = Claim(directory, resume=resume or requeued)
        if alive and not same_job:
            raise RunDirectoryError(
                f"{job.run_dir} is in use by job {record['job_id'] if record else '?'}.",
                key="run_dir",
                value=str(job.run_dir),
                hint="Wait for it to end or choose another run_dir.",
            )
        has_run = (job.run_dir / RUN_FILE).exists()
        if (has_run or record is not None) and not joins and not resume:
            if not overwrite:
                raise _holds_a_run(job.run_dir)
            put = _put_aside(directory, has_run=has_run)
            result.notes.append(f"The run that was there is in {put}.")
            has_run, record = False, None
        goes_on = result.resume and has_run and job.payload.kind == "train" and not (joins and alive)
        if goes_on and newest_complete_step(job.run_dir / CHECKPOINTS) is None:
            put = _put_aside(directory, has_run=True, keep_launch=True)
            result.notes.append(
                f"The run saved no checkpoint to go on from: it starts anew; its files are in {put}."
            )
        if joins and alive and record is not None:
            result.attempt = record["attempt"]
        else:
            result.attempt = (before["attempt"] if before is not None else 0) + (state == "started")
            directory.write_job({**_record(job, command, state, record, extra), "attempt": result.attempt})
        if state == "started":
            result._alive = directory.hold_alive()
    return result


def refuse_existing(job: Job, *, resume: bool, overwrite: bool) -> None:
    """Raise, as `reserve` would, for a run directory that cannot be used; changes nothing."""
    _refuse_foreign(job.run_dir)
    if resume or overwrite:
        return
    if (job.run_dir / RUN_FILE).exists() or LaunchDirectory(job.run_dir).job_file.exists():
        raise _holds_a_run(job.run_dir)


def _holds_a_run(run_dir: Path) -> RunDirectoryError:
    return RunDirectoryError(
        f"{run_dir} holds a run already.",
        key="run_dir",
        value=str(run_dir),
        hint="Go on with it: --resume. Put it aside and start anew: --overwrite.",
    )


def _refuse_foreign(run_dir: Path) -> None:
    """Refuse a path that is no directory, or holds files but no run."""
    if not run_dir.exists():
        return
    if not run_dir.is_dir():
        raise RunDirectoryError(f"{run_dir} is a file, not a directory.", key="run_dir", value=str(run_dir))
    others = sorted(entry.name for entry in run_dir.iterdir() if not entry.name.startswith("."))
    if others and RUN_FILE not in others and not (run_dir / LAUNCH_DIRECTORY / "job.json").exists():
        raise RunDirectoryError(
            f"{run_dir} holds other files ({', '.join(others[:3])}).",
            key="run_dir",
            value=str(run_dir),
            hint="Choose another run_dir.",
        )


def _put_aside(directory: LaunchDirectory, *, has_run: bool, keep_launch: bool = False) -> Path:
    """Move what the run directory holds to `.launch/replaced/<N>`, which it returns."""
    run = RunDirectory.reopen(directory.run_dir) if has_run else None  # locked: nobody writes there
    try:
        with writing(directory.path):
            parent = directory.path / "replaced"
            parent.mkdir(exist_ok=True)
            number = 1 + max((int(p.name) for p in parent.iterdir() if p.name.isdigit()), default=0)
            target = parent / str(number)
            target.mkdir()
            for entry in sorted(directory.run_dir.iterdir()):
                if entry.name not in _KEPT:
                    entry.rename(target / entry.name)
            if not keep_launch:
                (target / LAUNCH_DIRECTORY).mkdir()
                for name in _OF_A_RUN:
                    if (directory.path / name).exists():
                        (directory.path / name).rename(target / LAUNCH_DIRECTORY / name)
                directory.create()
    finally:
        if run is not None:
            run.close()
    return target


def _record(
    job: Job,
    command: Sequence[str],
    state: str,
    before: dict[str, Any] | None,
    extra: dict[str, Any] | None,
) -> dict[str, Any]:
    kept = before if before is not None and before["job_id"] == job.id else {}
    earlier = list(before.get("earlier_jobs", [])) if before else []
    if before is not None and before["job_id"] != job.id:
        earlier.append(before["job_id"])
    return {
        "job_id": job.id,
        "state": state,
        "launcher": job.launcher.name,
        "host": kept.get("host") or socket.gethostname(),
        "command": kept.get("command") or list(command),
        "overrides": list(job.overrides),
        "payload": list(job.payload.words) or ["train"],
        "recipe": job.recipe.to_dict(),
        "directory": os.getcwd(),
        "earlier_jobs": earlier,
        **{key: value for key, value in kept.items() if key == "slurm"},
        **(extra or {}),
    }
