"""What a person sees of a job: banner, progress, and the lines at the end. On rank 0; elsewhere nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from nemo_fp8_recipes.terminal import Terminal

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["ProgressLine", "banner", "farewell", "make_console", "progress"]

PLAIN_INTERVAL = 5.0  # seconds between two lines where there is no terminal to redraw
PLAIN_WIDTH = 120


def make_console(*, quiet: bool) -> Console:
    """The console of this rank: silent when `quiet`; of a fixed width where output is not a terminal."""
    console = Terminal(quiet=quiet, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PLAIN_WIDTH
    return console


def banner(console: Console, rows: Mapping[str, str]) -> None:
    """The facts of the job, one a line."""
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(f"[bold]{escape(name)}[/bold]", escape(value))
    console.print(table)
    console.print()


class ProgressLine:
    """Shows step, loss and step time. `update` is cheap enough for every step."""

    def update(self, step: int, loss: float, step_time_ms: float) -> None:
        raise NotImplementedError


class _Bar(ProgressLine):
    def __init__(self, bar: Progress, total: int, done: int) -> None:
        self._bar = bar
        self._task = bar.add_task("training", total=total, completed=done, loss="-", time="-")

    def update(self, step: int, loss: float, step_time_ms: float) -> None:
        self._bar.update(self._task, completed=step, loss=f"{loss:.4f}", time=f"{step_time_ms:.0f}")


class _Lines(ProgressLine):
    """Lines for logs: the first and the last step, and one every few seconds between."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        self._console = console
        self._total = total
        self._next = 0.0
        self._done = done

    def update(self, step: int, loss: float, step_time_ms: float) -> None:
        now = time.monotonic()
        if now < self._next and step != self._total:
            return
        self._next = now + PLAIN_INTERVAL
        self._console.print(f"step {step}/{self._total}  loss {loss:.4f}  {step_time_ms:.0f} ms/step")


@contextmanager
def progress(console: Console, *, total: int, done: int) -> Iterator[ProgressLine]:
    """A progress bar on a terminal, rate-limited lines elsewhere; `done` steps lie behind a resumed job."""
    if not console.is_terminal:
        yield _Lines(console, total, done)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("loss [bold]{task.fields[loss]}[/bold]"),
        TextColumn("{task.fields[time]} ms/step"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, refresh_per_second=4) as bar:
        yield _Bar(bar, total, done)


def farewell(
    console: Console,
    run_dir: Path,
    *,
    held_out: float | None,
    tensorboard: bool,
    resumable: bool,
) -> None:
    """The last lines, after the report: the held-out loss, where everything lies and how to look at it."""
    shown = _shortest(run_dir)
    rows: dict[str, str] = {}
    if held_out is not None:
        rows["held-out loss"] = f"{held_out:.4f} on sequences never trained on"
    rows["run directory"] = shown
    if tensorboard:
        rows["TensorBoard"] = f"tensorboard --logdir {shown}/tensorboard"
    rows["report"] = f"nemo-fp8 report --html {shown}"
    if resumable:
        rows["go on"] = f"nemo-fp8 train training.resume={shown} … (with the same overrides)"
    console.print()
    banner(console, rows)


def _shortest(path: Path) -> str:
    """Relative to the working directory when that is shorter."""
    try:
        relative = str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
    return relative
