"""What the benchmarks share: running contenders in turn, and tables of ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

__all__ = ["in_turn", "ratio_table"]


def in_turn(
    contenders: Mapping[str, Callable[[], object]], *, rounds: int, repeats: int
) -> dict[str, list[float]]:
    """Seconds of each contender in each round: the least of `repeats` calls in a row.

    The contenders take turns within a round, so that a slow moment of the machine meets all of them. On one
    thread it is CPU time, which other programs disturb less than they do the clock on the wall.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    for _ in range(rounds):
        for name, run in contenders.items():
            best = float("inf")
            for _ in range(repeats):
                start = clock()
                run()
                best = min(best, clock() - start)
            times[name].append(best)
    return times


def ratio_table(
    title: str, values: Mapping[str, Sequence[float]], *, against: str, unit: str, scale: float = 1.0
) -> str:
    """One line a contender: its values, and its ratios to those of `against` round by round, each as minimum,
    median and maximum.
    """
    width = max(len(name) for name in values)
    lines = [title, f"{'':{width}}  {unit + ' min':>9} {'median':>8} {'max':>8}   ratio min  median     max"]
    reference = values[against]
    for name, own in values.items():
        ratios = [value / base for value, base in zip(own, reference, strict=True)]
        shown = [value * scale for value in (min(own), statistics.median(own), max(own))]
        lines.append(
            f"{name:{width}}  {shown[0]:9.2f} {shown[1]:8.2f} {shown[2]:8.2f}   "
            f"{min(ratios):9.2f} {statistics.median(ratios):7.2f} {max(ratios):7.2f}"
        )
    return "\n".join(lines)
