"""What SLURM says about a job."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

__all__ = ["JobState", "job_state"]

_SECONDS = 30
_ENDED = frozenset(
    {
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    }
)


@dataclass(frozen=True)
class JobState:
    """A job's state as `scontrol` names it, its exit status, and why it waits."""

    name: str
    exit_status: int
    reason: str

    @property
    def waits(self) -> bool:
        """It has not been started, or is about to be started again."""
        return self.name in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "CONFIGURING")

    @property
    def ended(self) -> bool:
        return self.name in _ENDED


def job_state(job_id: str) -> JobState | None:
    """The state of a job; None where there is no SLURM, or it has forgotten the job."""
    if shutil.which("scontrol") is None:
        return None
    try:
        done = subprocess.run(
            ["scontrol", "show", "job", "-o", job_id],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        return None
    # Values hold spaces (a job's name), but the fields looked for are words.
    fields = dict(word.split("=", 1) for word in lines[0].split() if "=" in word)
    status, _, by_signal = fields.get("ExitCode", "0:0").partition(":")
    code = 128 + int(by_signal) if by_signal not in ("", "0") else int(status)
    return JobState(fields.get("JobState", "UNKNOWN"), code, fields.get("Reason", ""))
