"""What a person sees while a comparison runs: a bar in a terminal, a line at each end of a run elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from nemo_fp8_recipes.comparison.plan import Plan, Variant

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Display"]

PLAIN_INTERVAL = 30.0  # seconds between two lines where there is no terminal to redraw


class Display:
    """Shows which run is on, its step and its loss."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self._plan = plan
        self._console = console
        self._bars: Progress | None = None
        self._task: TaskID | None = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}"),
                TimeRemainingColumn(),
            )
            self._bars = Progress(*columns, console=console)

    def __enter__(self) -> Display:
        self._console.print(
            f"{len(self._plan.variants)} runs in {self._plan.directory}", markup=False, soft_wrap=True
        )
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def reused(self, number: int, variant: Variant) -> None:
        """A run that finished earlier is kept."""
        self._line(number, variant, "finished earlier, reused")

    def started(self, number: int, variant: Variant) -> Callable[[int, float | None], None]:
        """A run starts; what is returned is told its step and loss."""
        if self._bars is None:
            self._line(number, variant, "started")
            return self._plain(number, variant)
        self._task = self._bars.add_task(self._name(number, variant), total=variant.steps, loss="-")
        return self._redraw

    def ended(self, number: int, variant: Variant, status: int) -> None:
        """A run ended with this exit status."""
        if status == 0:
            if self._bars is None:
                self._line(number, variant, "finished")
            return
        self._line(number, variant, f"ended with status {status}; it printed {variant.log}")

    def _redraw(self, step: int, loss: float | None) -> None:
        if self._bars is not None and self._task is not None:
            shown = "-" if loss is None else f"{loss:.4f}"
            self._bars.update(self._task, completed=step, loss=shown)

    def _plain(self, number: int, variant: Variant) -> Callable[[int, float | None], None]:
        last = time.monotonic()

        def show(step: int, loss: float | None) -> None:
            nonlocal last
            if loss is not None and time.monotonic() - last >= PLAIN_INTERVAL:
                last = time.monotonic()
                self._line(number, variant, f"step {step} of {variant.steps}, loss {loss:.4f}")

        return show

    def _name(self, number: int, variant: Variant) -> str:
        return f"[{number}/{len(self._plan.variants)}] {variant.label}"

    def _line(self, number: int, variant: Variant, text: str) -> None:
        self._console.print(escape(f"{self._name(number, variant)}: {text}"), soft_wrap=True)
