"""What the batch script starts: once a node to check it, then once a task to run it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.launch import torchrun
from nemo_fp8_recipes.launch.arguments import Arguments
from nemo_fp8_recipes.launch.check import check_node
from nemo_fp8_recipes.launch.claim import claim, node_name
from nemo_fp8_recipes.launch.node import Ended, Processes, run_node
from nemo_fp8_recipes.launch.plan import Job
from nemo_fp8_recipes.launch.slurm.jobs import this_job
from nemo_fp8_recipes.launch.slurm.script import config_of
from nemo_fp8_recipes.preflight import driver

__all__ = ["run", "run_task"]


def run(arguments: Arguments, typed: Sequence[str]) -> int:
    """Check this node, or run this task's processes to their end; returns the exit status."""
    job = this_job(arguments)
    if os.environ.get("NEMO_FP8_ONLY_CHECK"):
        check_node(job, driver.found() if not job.emulated else [])
        return 0
    return run_task(job, typed, resume=arguments.resume, checked=True).status


def run_task(
    job: Job,
    typed: Sequence[str],
    *,
    resume: bool = False,
    checked: bool = False,
    extra: dict[str, Any] | None = None,
) -> Ended:
    """Run what this task of a SLURM job step starts: the node's torchrun, or one rank.

    Args:
        typed: the command line, for the record.
        checked: preflight has passed on every node already.
        extra: more for the job's record.
    """
    processes = _one_process(job) if config_of(job).tasks == "gpu" else _torchrun(job)
    requeued = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
    claimed = claim(job, typed, resume=resume, overwrite=False, requeued=requeued, extra=extra)
    try:
        return run_node(job, claimed, processes, checked=checked)
    finally:
        claimed.release()


def _variable(name: str) -> str:
    try:
        return os.environ[name]
    except KeyError:
        raise ConfigError(
            f"{name} is not set: nemo-fp8 launch --on-node is what the batch script starts.", key="--on-node"
        ) from None


def _torchrun(job: Job) -> Processes:
    """A node's torchrun."""
    launcher, count = config_of(job), job.processes_per_node()
    prefix = torchrun.command(
        job_id=job.id,
        nodes=launcher.nodes,
        nproc_per_node=count,
        rendezvous=f"{_variable('NEMO_FP8_RENDEZVOUS_HOST')}:{_variable('NEMO_FP8_RENDEZVOUS_PORT')}",
        timeout_minutes=launcher.rendezvous_timeout_minutes,
        python=sys.executable,
    )
    return Processes(count=count, prefix=prefix)


def _one_process(job: Job) -> Processes:
    """One rank, told by SLURM which."""
    variables = {
        "RANK": _variable("SLURM_PROCID"),
        "LOCAL_RANK": _variable("SLURM_LOCALID"),
        "WORLD_SIZE": _variable("SLURM_NTASKS"),
        "LOCAL_WORLD_SIZE": str(job.processes_per_node()),
        "MASTER_ADDR": _variable("NEMO_FP8_RENDEZVOUS_HOST"),
        "MASTER_PORT": _variable("NEMO_FP8_RENDEZVOUS_PORT"),
    }
    name = f"{node_name()}-{variables['LOCAL_RANK']}"
    return Processes(count=job.processes_per_node(), variables=variables, name=name)
