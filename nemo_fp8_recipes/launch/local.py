"""`launcher=local`: one process on this machine, in the foreground."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_fp8_recipes.launch.claim import claim
from nemo_fp8_recipes.launch.node import Processes, run_node
from nemo_fp8_recipes.launch.plan import Job

__all__ = ["PROCESSES", "run"]

PROCESSES = Processes(count=1, log_to_file=False)


def run(job: Job, typed: Sequence[str], *, resume: bool, overwrite: bool) -> int:
    """Run the job to its end; returns the exit status."""
    claimed = claim(job, typed, resume=resume, overwrite=overwrite, requeued=False)
    try:
        return run_node(job, claimed, PROCESSES).status
    finally:
        claimed.release()
