"""`launcher=torchrun`: this node's torchrun, alone or meeting those of other nodes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from nemo_fp8_recipes.launch.claim import claim
from nemo_fp8_recipes.launch.node import Processes, run_node
from nemo_fp8_recipes.launch.plan import Job
from nemo_fp8_recipes.launch.schema import TorchrunConfig

__all__ = ["command", "run"]


def command(
    *,
    job_id: str,
    nodes: int,
    nproc_per_node: int,
    rendezvous: str | None,
    timeout_minutes: int,
    python: str = sys.executable,
) -> list[str]:
    """torchrun's command line up to the module that it starts.

    Args:
        rendezvous: HOST:PORT; None: a free port of this machine, for one node.
        timeout_minutes: how long a node waits for the others.
    """
    meeting = [f"--rdzv-endpoint={rendezvous}"]
    if rendezvous is None:
        meeting = ["--rdzv-endpoint=localhost:0", "--local-addr=localhost"]
    return [
        python,
        "-m",
        "torch.distributed.run",
        f"--nnodes={nodes}",
        f"--nproc-per-node={nproc_per_node}",
        "--rdzv-backend=c10d",
        *meeting,
        f"--rdzv-id={job_id}",
        f"--rdzv-conf=join_timeout={timeout_minutes * 60}",
        "--max-restarts=0",  # a failed job goes on from its checkpoint, not from the middle of nothing
        "-m",
    ]


def processes(job: Job) -> Processes:
    """The processes of this node as `launcher=torchrun` asks for them."""
    launcher = job.launcher
    assert isinstance(launcher, TorchrunConfig)
    count = job.processes_per_node()
    prefix = command(
        job_id=job.id,
        nodes=launcher.nodes,
        nproc_per_node=count,
        rendezvous=launcher.rendezvous,
        timeout_minutes=launcher.rendezvous_timeout_minutes,
    )
    return Processes(count=count, prefix=prefix)


def run(job: Job, typed: Sequence[str], *, resume: bool, overwrite: bool) -> int:
    """Run this node's part of the job to its end; returns the exit status."""
    started = processes(job)
    claimed = claim(job, typed, resume=resume, overwrite=overwrite, requeued=False)
    try:
        return run_node(job, claimed, started).status
    finally:
        claimed.release()
