"""SIGINT and SIGTERM as a wish to stop after the current step, and the end at once where there is none."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

__all__ = ["WATCHED", "Interruption", "end_on_ctrl_c", "received", "watch_signals"]

WATCHED = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """The signal that asked this process to stop, if one did."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def flags(self) -> list[float]:
        """1.0 for the signal that was received, 0.0 for every other one that is watched: to be summed over
        ranks, then `received` says what some rank has got."""
        return [float(self.signal == watched) for watched in WATCHED]


def received(flags: Sequence[float]) -> int:
    """The signal that some rank has received, of `Interruption.flags` summed over ranks; 0: none has."""
    return next((int(watched) for watched, ranks in zip(WATCHED, flags, strict=True) if ranks), 0)


@contextmanager
def end_on_ctrl_c() -> Iterator[None]:
    """Within the block SIGINT ends the process at once, with one line and status 130, where Python would
    raise `KeyboardInterrupt`.

    That comes up at any place. Libraries catch it, or are left half imported, and the job would end with an
    error of theirs, or go on. What a killed job leaves can be resumed, and so can this.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # it means something else here, or nothing
        return

    def end(number: int, frame: FrameType | None) -> None:
        del frame
        os.write(2, b"nemo-fp8: interrupted\n")  # print may be what was interrupted
        os._exit(128 + number)

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def watch_signals() -> Iterator[Interruption]:
    """Within the block the first SIGINT or SIGTERM is only noted; the next one acts as it did before."""
    interruption = Interruption()
    before = {number: signal.getsignal(number) for number in WATCHED}

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        interruption.signal = signal.Signals(number)
        for watched, handler in before.items():
            signal.signal(watched, handler)

    for number in WATCHED:
        signal.signal(number, note)
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
