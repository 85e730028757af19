"""Whether a job still moves, judged by what it writes."""

from __future__ import annotations

import os
import time
from pathlib import Path

from nemo_fp8_recipes.launch.directory import LaunchDirectory
from nemo_fp8_recipes.training.run_directory import (
    CHECKPOINTS,
    DATA_INDEX,
    MANIFEST_FILE,
    METRICS_FILE,
    RUN_FILE,
)

__all__ = ["HangWatch"]

_POLL_SECONDS = 2.0


class HangWatch:
    """Notices that nothing has changed for `seconds`: no logged step, checkpoint or index of token files of
    the training job, no output of a user's script. Every node of a job looks at the same files, so all of
    them notice.
    """

    def __init__(self, directory: LaunchDirectory, seconds: float, *, by_output: bool) -> None:
        self._directory = directory
        self._seconds = seconds
        self._by_output = by_output
        self._seen: object = None
        self._changed = time.monotonic()
        self._next = 0.0

    def hangs(self) -> bool:
        """Whether it has stood still for too long; cheap enough to be asked often."""
        now = time.monotonic()
        if not self._seconds or now < self._next:
            return False
        self._next = now + min(_POLL_SECONDS, self._seconds / 4)
        seen = self._look()
        if seen != self._seen:
            self._seen, self._changed = seen, now
        return now - self._changed >= self._seconds

    def _look(self) -> object:
        run = self._directory.run_dir
        paths = [run / name for name in (RUN_FILE, METRICS_FILE, MANIFEST_FILE)]
        checkpoints = sorted(_children(run / CHECKPOINTS))
        if checkpoints:
            paths += [*checkpoints, *_children(checkpoints[-1])]
        for index in _children(run / DATA_INDEX):
            paths += _children(index)
        if self._by_output:
            paths += _children(self._directory.path / "logs")
        return [(str(path), *_mark(path)) for path in paths]


def _children(directory: Path) -> list[Path]:
    try:
        return [Path(entry.path) for entry in os.scandir(directory)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _mark(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except FileNotFoundError:
        return (0, 0)
    return (status.st_size, status.st_mtime_ns)
