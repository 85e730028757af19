"""The state of a run, from its records, its locks and, where there is one, SLURM. Changes nothing.

`run.json` says how a run stands as far as the job itself could write it. A job that was killed leaves
"running" behind, which counts only while somebody holds the run directory's lock.
"""

from __future__ import annotations

import json
import math
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from nemo_fp8_recipes.errors import CheckpointError, RunDirectoryError
from nemo_fp8_recipes.launch.directory import LaunchDirectory, is_locked
from nemo_fp8_recipes.launch.slurm.query import JobState, job_state
from nemo_fp8_recipes.training.checkpoint.directory import newest_complete_step
from nemo_fp8_recipes.training.run_directory import CHECKPOINTS, LOCK_FILE, METRICS_FILE, RUN_FILE, read_run

__all__ = ["SCHEMA_VERSION", "Run", "State", "find_runs", "read_run_state"]

SCHEMA_VERSION = 1

State = Literal["queued", "running", "finished", "failed", "interrupted", "unreadable"]


@dataclass(frozen=True)
class Run:
    """One run directory, as `nemo-fp8 runs` lists it.

    Attributes:
        path: the run directory.
        state: queued (waits in SLURM), running, finished, failed, interrupted (stopped or killed), or
            unreadable.
        reason: why it failed, was interrupted or waits.
        resumable: whether it has a complete checkpoint and did not finish.
        checkpoint_step: step of the newest complete checkpoint.
        recipe: canonical name.
        device: "emulated b200", or the name of the GPU.
        steps: of the whole job; None for a user's script.
        last_step, last_loss: of the last line of metrics.jsonl; a loss of None there is not a number.
        started, ended: ISO 8601, UTC.
        launcher, job_id: how it was started; None for a plain `nemo-fp8 train`.
        exit_code: of a launched job that has ended.
    """

    path: str
    state: State
    reason: str | None = None
    resumable: bool = False
    checkpoint_step: int | None = None
    recipe: str | None = None
    device: str | None = None
    last_step: int | None = None
    last_loss: float | None = None
    started: str | None = None
    ended: str | None = None
    launcher: str | None = None
    job_id: str | None = None
    exit_code: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """A mapping that JSON can hold."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}


def find_runs(parent: Path) -> list[Path]:
    """The run directories: `parent` itself when it is one, else those right below it, by name."""
    if _is_run(parent):
        return [parent]
    if not parent.is_dir():
        return []
    return sorted(entry for entry in parent.iterdir() if entry.is_dir() and _is_run(entry))


def _is_run(path: Path) -> bool:
    return (path / RUN_FILE).exists() or LaunchDirectory(path).job_file.exists()


def read_run_state(path: Path) -> Run:
    """The state of the run in `path`; a record that cannot be read makes it unreadable, with the reason."""
    try:
        return _read(path)
    except (CheckpointError, RunDirectoryError) as error:
        return Run(str(path), "unreadable", reason=error.message)
    except (AttributeError, KeyError, TypeError) as error:
        said = f"no {error}" if isinstance(error, KeyError) else str(error)
        return Run(str(path), "unreadable", reason=f"its records are not of the form written here: {said}")


def _read(path: Path) -> Run:
    launch = LaunchDirectory(path)
    job = launch.read_job()
    record = read_run(path) if (path / RUN_FILE).exists() else None
    checkpoint = newest_complete_step(path / CHECKPOINTS)
    step, loss = _last_metrics(path / METRICS_FILE)
    nodes = launch.nodes() if job is not None else []
    codes = [node["exit_code"] for node in nodes if node["attempt"] == (job or {}).get("attempt")]
    state, reason = _state(path, record, job, launch, codes)
    recipe = (record or job or {}).get("recipe", {}).get("name")
    if not isinstance(recipe, str | None):
        raise RunDirectoryError(f"The recipe that {path} records has no name.", value=str(path))
    return Run(
        path=str(path),
        state=state,
        reason=reason,
        resumable=checkpoint is not None and state in ("failed", "interrupted"),
        checkpoint_step=checkpoint,
        recipe=recipe,
        device=(record or {}).get("device"),
        last_step=step,
        last_loss=loss,
        started=(record or {}).get("started") or (nodes[0]["started"] if nodes else None),
        ended=(record or {}).get("ended") or (nodes[0]["ended"] if nodes else None),
        launcher=job["launcher"] if job else None,
        job_id=job["job_id"] if job else None,
        exit_code=max((code for code in codes if code is not None), default=None),
    )


def _state(
    path: Path,
    record: dict[str, Any] | None,
    job: dict[str, Any] | None,
    launch: LaunchDirectory,
    codes: list[int | None],
) -> tuple[State, str | None]:
    status = record["status"] if record is not None else None
    if launch.is_alive() and status != "finished":
        return "running", None
    if status in ("finished", "failed"):
        slurm = None if status == "finished" else _slurm(job)
        if slurm is not None and slurm.waits:
            return "queued", slurm.reason
        error = record.get("error") if record is not None else None
        return ("finished" if status == "finished" else "failed"), error
    if is_locked(path / LOCK_FILE):
        return "running", None
    slurm = _slurm(job)
    if slurm is not None and slurm.waits:
        return "queued", slurm.reason
    if slurm is not None and not slurm.ended:
        return "running", None  # on other machines, whose locks a file system may not show here
    if record is not None:
        reason = record.get("error")
        return "interrupted", reason or "its process is gone without a word: killed, or the machine went down"
    return _launched_only(path, job, codes, slurm)


def _launched_only(
    path: Path, job: dict[str, Any] | None, codes: list[int | None], slurm: JobState | None
) -> tuple[State, str | None]:
    """A user's script, which writes no run.json, or a job that ended before its run began."""
    assert job is not None
    if codes and all(code == 0 for code in codes):
        return "finished", None
    failed = [code for code in codes if code]
    if failed:
        stopped = max(failed) in (130, 143)
        return ("interrupted" if stopped else "failed"), f"exit status {max(failed)}; see {_where(path, job)}"
    if slurm is not None:
        return "failed", f"SLURM: {slurm.name.lower()}; see {_where(path, job)}"
    if codes or job["host"] == socket.gethostname():
        return "interrupted", "its process is gone without a word: killed, or the machine went down"
    return "interrupted", f"nothing is known of it; it was submitted on {job['host']}"


def _where(path: Path, job: dict[str, Any]) -> str:
    """Where the job's own words are. Submitit keeps SLURM's output elsewhere."""
    if job["launcher"] == "slurm" and LaunchDirectory(path).batch_output.exists():
        return ".launch/slurm.out"
    return ".launch/logs"


def _slurm(job: dict[str, Any] | None) -> JobState | None:
    if job is None or "slurm" not in job:
        return None
    return job_state(job["slurm"]["job_id"])


def _last_metrics(path: Path) -> tuple[int | None, float | None]:
    """Step and loss of the last whole line; the line that is being written does not count."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 65536))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return None, None
    for line in reversed(lines):
        try:
            row = json.loads(line)
            loss = float(row["loss"]) if row["loss"] is not None else math.nan
            return int(row["step"]), loss if math.isfinite(loss) else None
        except (ValueError, KeyError, TypeError):
            continue
    return None, None
