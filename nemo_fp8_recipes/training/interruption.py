"""SIGINT and SIGTERM as a wish to stop after the current step."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

__all__ = ["WATCHED", "Interruption", "received", "watch_signals"]

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
