"""One process writes the store of a run: the claim to it."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from nemo_fp8_recipes.errors import RunDirectoryError

__all__ = ["Claim"]

LOCK_FILE = ".telemetry.lock"
_TAKEN = (errno.EACCES, errno.EAGAIN)


class Claim:
    """Held from here to `release`. The kernel gives it up with the process, however that ends, so a job that
    was killed leaves nothing behind; within a process a second claim is no other writer and is let through.

    Where there can be no lock (a file system that knows none, a full disk), there is none: what cannot be
    written shows when it is to be.

    Args:
        run_dir: the run directory; it is created.

    Raises:
        RunDirectoryError: another process has it.
    """

    def __init__(self, run_dir: Path) -> None:
        self._descriptor: int | None = None
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(run_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.release()
            if error.errno in _TAKEN and (run_dir / LOCK_FILE).exists() and os.access(run_dir, os.W_OK):
                raise RunDirectoryError(
                    f"Another process writes telemetry to {run_dir}.",
                    key="directory",
                    value=str(run_dir),
                    hint="Wait for it to end, or name another directory: one store would mix two runs.",
                ) from error

    def release(self) -> None:
        """Give it up; safe to call again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
