"""What a sink is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nemo_fp8_recipes.telemetry.series import StepValues

__all__ = ["Sink"]


class Sink:
    """Takes values of logging steps and training metrics. Every method is a documented no-op here.

    A sink is called on the writing rank only, at most once a step for each method, steps ascending. It raises
    where it cannot do its work; `GuardedSink` decides what follows.
    """

    name = "sink"

    def values(self, values: StepValues) -> None:
        """All values of one logging step. Called again with the same ones after it raised."""

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Training metrics of one step: loss, learning_rate, …"""

    def truncate_after(self, step: int) -> None:
        """Forget what was written for steps after `step`: training goes on from there."""

    def flush(self) -> None:
        """Make everything taken so far readable by others."""

    def close(self) -> None:
        """Flush and release files. Nothing is called afterwards."""

    def read(self, stat: str, modules: Iterable[str]) -> list[dict[str, Any]]:
        """What was written of a windowed statistic of some modules, one dict a row with step, module, tensor
        and values, fp32 (length,), in any order; empty where this sink cannot read it back.
        """
        del stat, modules  # for those who can
        return []

    def unwritten(self) -> int:
        """Values taken but not yet written."""
        return 0
