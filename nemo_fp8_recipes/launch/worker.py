"""What runs in every process of a job before the job itself does. Standard library only until then.

    python -m nemo_fp8_recipes.launch.worker train <overrides>
    python -m nemo_fp8_recipes.launch.worker script <path> <arguments>
    python -m nemo_fp8_recipes.launch.worker module <name> <arguments>

It sends output to the rank's log, makes the process end with the one that started it, turns the wish to stop
into one SIGTERM however often it arrives, dumps all stacks on SIGUSR2, and records pid and exit status.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from types import FrameType

__all__ = ["AGENT", "DUMP", "LAUNCH_DIR", "LOG_TO_FILE", "STOP", "main"]

LAUNCH_DIR = "NEMO_FP8_LAUNCH_DIR"
AGENT = "NEMO_FP8_AGENT"
LOG_TO_FILE = "NEMO_FP8_LOG_TO_FILE"

STOP = signal.SIGUSR1  # please stop
DUMP = signal.SIGUSR2  # show where you are
_PR_SET_PDEATHSIG = 1


class _Stopping:
    """SIGTERM acts once. A scheduler, torchrun and the launcher may each send one for the same reason, and
    the second must not end a process that is saving its state because of the first.

    The kernel's view of what has arrived comes from the wakeup descriptor: it sees signals that the job's own
    handler took as well.
    """

    def __init__(self) -> None:
        self._reading, writing = os.pipe()
        os.set_blocking(self._reading, False)
        os.set_blocking(writing, False)
        self._terms = 0
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._on_term)
        signal.signal(STOP, self._on_stop)
        # Held back around a fork: what is sent to a child at once must not meet its parent's handlers there.
        self._mask = threading.local()
        os.register_at_fork(before=self._hold, after_in_parent=self._release, after_in_child=self._leave)

    def _hold(self) -> None:
        self._mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, STOP))

    def _release(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask.before)

    def _leave(self) -> None:
        """In a forked child: what ends a data loader is no wish to stop its parent, which the shared
        descriptor would make it; nor shall that wish end a child that is writing a checkpoint."""
        signal.set_wakeup_fd(-1)
        if signal.getsignal(signal.SIGTERM) == self._on_term:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if signal.getsignal(STOP) == self._on_stop:
            signal.signal(STOP, signal.SIG_IGN)
        self._release()

    def _count(self) -> int:
        with contextlib.suppress(BlockingIOError):  # nothing new
            self._terms += os.read(self._reading, 65536).count(bytes([signal.SIGTERM]))
        return self._terms

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        """Reached before the job watches for SIGTERM, and after it took its first one."""
        del frame
        if self._count() <= 1:
            raise SystemExit(128 + number)

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self._count() == 0:
            os.kill(os.getpid(), signal.SIGTERM)


class _Record:
    """`ranks/rank_N.json`: who this process is and how it ended."""

    def __init__(self, directory: Path, rank: int) -> None:
        self._path = directory / "ranks" / f"rank_{rank}.json"
        self._values = {
            "schema_version": 1,
            "rank": rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "agent": os.environ.get(AGENT),
            "exit_code": None,
        }

    def write(self, exit_code: int | None = None) -> None:
        self._values["exit_code"] = exit_code
        descriptor, name = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(self._values, file)
        Path(name).replace(self._path)


def _end_with_parent() -> None:
    """Ask the kernel to end this process when its parent is gone, however that went (Linux)."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit(128 + signal.SIGKILL)


def _log_to(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _run(kind: str, words: list[str]) -> int:
    if kind == "train":
        cli = importlib.import_module("nemo_fp8_recipes.cli")
        return int(cli.main(["train", *words]))
    target, *arguments = words
    if kind == "module":
        sys.argv = [target, *arguments]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [target, *arguments]
        sys.path.insert(0, str(Path(target).parent))
        runpy.run_path(target, run_name="__main__")
    return 0


def _status(exit: SystemExit) -> int:
    if exit.code is None or isinstance(exit.code, int):
        return exit.code or 0
    print(exit.code, file=sys.stderr)
    return 1


def main(words: list[str]) -> int:
    """Prepare this process, run the job in it, and return its exit status."""
    named = os.environ.get(LAUNCH_DIR)
    if named is None:  # a line that --dry-run printed, typed by hand: nobody reads records or sends signals
        return _run(words[0], words[1:])
    directory = Path(named)
    rank = int(os.environ.get("RANK", "0"))
    if os.environ.get(LOG_TO_FILE):
        _log_to(directory / "logs" / f"rank_{rank}.log")
    _end_with_parent()
    stacks = (directory / "stacks" / f"rank_{rank}.txt").open("a", encoding="utf-8")
    faulthandler.register(DUMP, file=stacks, all_threads=True)
    _Stopping()
    record = _Record(directory, rank)
    record.write()
    status = 1
    try:
        status = _run(words[0], words[1:])
    except SystemExit as exit:
        status = _status(exit)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        record.write(status)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
