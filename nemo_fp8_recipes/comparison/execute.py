"""Running the variants of a comparison, one process after the other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from nemo_fp8_recipes.comparison.plan import Plan, Variant
from nemo_fp8_recipes.comparison.progress import Display
from nemo_fp8_recipes.training.files import writing
from nemo_fp8_recipes.training.run_directory import METRICS_FILE

__all__ = ["execute"]

POLL_SECONDS = 0.2
TAIL_BYTES = 8192  # many times a line
_STOPPING = (signal.SIGINT, signal.SIGTERM)


def execute(plan: Plan, display: Display, *, resume: bool = False) -> int:
    """Run every variant that has not finished.

    A run that fails does not stop the others: that one recipe diverges is a result. A signal stops the run in
    progress as it would stop `nemo-fp8 train`, and the comparison with it.

    Returns:
        0, or 128 + the signal that stopped the comparison.
    """
    with writing(plan.directory):
        plan.directory.mkdir(parents=True, exist_ok=True)
    with _Signals() as signals:
        for number, variant in enumerate(plan.variants, start=1):
            if resume and variant.status() == "finished":
                display.reused(number, variant)
                continue
            status = _run(variant, signals, display.started(number, variant))
            display.ended(number, variant, status)
            if signals.received:
                return 128 + signals.received
    return 0


def command(variant: Variant) -> list[str]:
    """The `nemo-fp8 train` of a variant; it goes on where an earlier attempt left a checkpoint."""
    path = str(variant.path).replace("\\", "\\\\").replace("'", "\\'")
    again = ["training.resume=auto"] if variant.status() is not None else []
    return [
        sys.executable,
        "-m",
        "nemo_fp8_recipes",
        "train",
        *variant.overrides,
        f"run_dir='{path}'",
        *again,
    ]


def _run(variant: Variant, signals: _Signals, show: Callable[[int, float | None], None]) -> int:
    with writing(variant.log), variant.log.open("ab") as log:
        # A session of its own: Ctrl-C in the terminal reaches the run once, from here.
        process = subprocess.Popen(
            command(variant),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "COLUMNS": os.environ.get("COLUMNS", "120")},
            start_new_session=True,
        )
    with signals.to(process):
        tail = _Tail(variant.path / METRICS_FILE)
        while process.poll() is None:
            show(*tail.newest())
            time.sleep(POLL_SECONDS)
    show(*tail.newest())
    return process.returncode


class _Signals:
    """Passes SIGINT and SIGTERM on to the run in progress, which then saves and ends."""

    def __init__(self) -> None:
        self.received = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal gave

    @contextmanager
    def to(self, process: subprocess.Popen[bytes]) -> Iterator[None]:
        """In the block, signals go on to `process`; it is ended where the block is left by an error."""
        self._process = process
        try:
            if self.received:
                process.send_signal(self.received)
            yield
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            self._process = None

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.received = number
        if self._process is not None:
            self._process.send_signal(number)


class _Tail:
    """The newest complete line of a metrics file that another process writes, or replaces by a shorter."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def newest(self) -> tuple[int, float | None]:
        """Step and loss; 0 and None before the first line."""
        if not self._path.exists():
            return 0, None
        with self._path.open("rb") as file:
            file.seek(max(0, self._path.stat().st_size - TAIL_BYTES))
            # After the last newline is a line that is still being written.
            lines = file.read().split(b"\n")[:-1]
        if not lines:
            return 0, None
        row = json.loads(lines[-1])
        return int(row["step"]), row["loss"]
