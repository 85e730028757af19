"""The part of a job that one node runs: claim, preflight, variables, processes."""

from __future__ import annotations

import datetime
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nemo_fp8_recipes.launch import environment
from nemo_fp8_recipes.launch.agent import STOPPED, Agent
from nemo_fp8_recipes.launch.check import check_node
from nemo_fp8_recipes.launch.claim import Claim, node_name
from nemo_fp8_recipes.launch.plan import Job
from nemo_fp8_recipes.launch.progress import HangWatch
from nemo_fp8_recipes.preflight import driver
from nemo_fp8_recipes.training.files import atomic_write_json

__all__ = ["Ended", "Processes", "run_node", "settings_for"]


@dataclass(frozen=True)
class Processes:
    """How the processes of a node are started.

    `prefix` is put before the worker's own command; empty: the node's single process is started directly,
    with `variables` saying which rank it is.
    """

    count: int
    prefix: Sequence[str] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    log_to_file: bool = True
    name: str = ""
    """Of the node's record; empty: the node's name."""


@dataclass(frozen=True)
class Ended:
    """How a node's processes ended: the job's exit status, as seen here, and the signal that asked for it."""

    status: int
    asked: signal.Signals | None = None


def worker_command(job: Job, prefix: Sequence[str], *, resume: bool) -> list[str]:
    """The command of one process: what `prefix` (torchrun) starts, or this interpreter where it is empty."""
    start = list(prefix) or [sys.executable, "-m"]
    words = job.train_arguments(resume=resume) if job.payload.kind == "train" else _script(job)
    return [*start, "nemo_fp8_recipes.launch.worker", job.payload.kind, *words]


def _script(job: Job) -> list[str]:
    return [job.payload.target, *job.payload.arguments]


def settings_for(
    job: Job, capability: tuple[int, int] | None, processes: int, inherited: Mapping[str, str]
) -> list[environment.Setting]:
    """The variables of the job on a node, and where each is from."""
    known = job.config.hardware.compute_capability
    variables = environment.needed(
        job.recipe,
        capability=(int(known[0]), int(known[1])) if known is not None else capability,
        tensor_parallel=job.config.parallel.tp,
        deterministic=job.config.training.deterministic,
        processes=processes,
    )
    return environment.resolve(variables, job.launcher.environment, inherited)


def run_node(job: Job, claimed: Claim, processes: Processes, *, checked: bool = False) -> Ended:
    """Run this node's processes to their end.

    Args:
        checked: preflight has passed on every node already.

    Raises:
        PreflightError: the job would fail here; nothing was started.
    """
    found = driver.found() if not job.emulated else []
    if not checked:
        check_node(job, found)
    settings = settings_for(job, found[0].compute_capability if found else None, processes.count, os.environ)
    for note in [*claimed.notes, *filter(None, (setting.note() for setting in settings))]:
        print(f"nemo-fp8 launch: {note}", file=sys.stderr, flush=True)
    name = processes.name or node_name()
    record = {
        "schema_version": 1,
        "node": name,
        "host": socket.gethostname(),
        "job_id": job.id,
        "attempt": claimed.attempt,
        "pid": os.getpid(),
        "processes": processes.count,
        "gpus": [gpu.name for gpu in found],
        "environment": [setting.to_dict() for setting in settings],
        "started": _now(),
        "ended": None,
        "exit_code": None,
    }
    file = claimed.directory.node_file(name)
    atomic_write_json(file, record)
    agent = Agent(
        directory=claimed.directory,
        command=worker_command(job, processes.prefix, resume=claimed.resume),
        environment={
            **os.environ,
            **{setting.name: setting.value for setting in settings},
            **processes.variables,
            "NEMO_FP8_JOB_ID": job.id,
            "NEMO_FP8_RUN_DIR": str(job.run_dir),
            "NEMO_FP8_RESUME": "1" if claimed.resume else "",
        },
        watch=HangWatch(
            claimed.directory,
            job.launcher.hang_timeout_minutes * 60.0,
            by_output=job.payload.kind != "train",
        ),
        stop_timeout=job.launcher.stop_timeout_seconds,
        failed_elsewhere=lambda: _failed_elsewhere(claimed, name),
        output=claimed.directory.torchrun_log(name) if processes.prefix else None,
        log_to_file=processes.log_to_file,
    )
    status = agent.run()
    atomic_write_json(file, {**record, "ended": _now(), "exit_code": status})
    return Ended(status, agent.asked)


def _failed_elsewhere(claimed: Claim, name: str) -> int | None:
    """The exit status with which another node of this attempt failed, if one did."""
    return next(
        (
            node["exit_code"]
            for node in claimed.directory.nodes()
            if node["node"] != name
            and node["attempt"] == claimed.attempt
            and node["exit_code"] not in STOPPED
        ),
        None,
    )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
