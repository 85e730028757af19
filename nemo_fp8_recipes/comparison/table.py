"""A comparison as a table in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from nemo_fp8_recipes.comparison.outcome import Comparison, Outcome

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["render"]

_STYLES = {"finished": "", "failed": "red", "interrupted": "yellow", "running": "cyan", "not started": "dim"}

_SHOWN = 5


def render(comparison: Comparison, console: Console) -> None:
    """Print the runs, one a row, and what the numbers are."""
    base = comparison.baseline
    telemetry = any(o.sqnr_db or o.underflow for o in comparison.outcomes)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("run")
    if any(outcome.status != "finished" for outcome in comparison.outcomes):
        table.add_column("status", overflow="fold")
    headings = ["loss", f"- {base}", "held-out", f"- {base}"] if base else ["loss", "held-out"]
    headings += ["step ms", *([f"/ {base}"] if base else []), "GEMMs quantised"]
    headings += ["SQNR dB", "underflow"] if telemetry else []
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    with_status = len(table.columns) > len(headings) + 1
    for outcome in comparison.outcomes:
        cells = [escape(outcome.label)]
        if with_status:
            style = _STYLES.get(outcome.status, "")
            cells.append(f"[{style}]{outcome.status}[/{style}]" if style else outcome.status)
        table.add_row(*cells, *_numbers(outcome, base, telemetry=telemetry))
    console.print(table)
    for outcome in comparison.outcomes:
        if outcome.error:
            console.print(f"{outcome.label}: {outcome.error}", markup=False, style="red", soft_wrap=True)
    for line in _legend(comparison, telemetry=telemetry):
        console.print(line, markup=False, style="dim", soft_wrap=True)


def _numbers(outcome: Outcome, base: str | None, *, telemetry: bool) -> list[str]:
    is_base = outcome.label == base
    cells = [_fixed(outcome.loss)]
    if base:
        cells.append("" if is_base else _signed(outcome.loss_difference))
    cells.append(_fixed(outcome.held_out_loss))
    if base:
        cells.append("" if is_base else _signed(outcome.held_out_difference))
    cells.append("-" if outcome.step_time_ms is None else f"{outcome.step_time_ms:.0f}")
    if base:
        ratio = outcome.step_time_ratio
        cells.append("" if is_base else "-" if ratio is None else f"{ratio:.2f}")
    share = outcome.quantized_share
    cells.append(
        "-"
        if share is None
        else f"{_short(outcome.gemms_quantized)} of {_short(outcome.gemms)} ({100 * share:.0f} %)"
    )
    if telemetry:
        sqnr, underflow = outcome.sqnr_db, outcome.underflow
        cells.append("-" if sqnr is None else f"{sqnr[0]:.1f} ({sqnr[1]:.1f})")
        cells.append("-" if underflow is None else f"{100 * underflow[0]:.2g} % ({100 * underflow[1]:.2g} %)")
    return cells


def _legend(comparison: Comparison, *, telemetry: bool) -> list[str]:
    lines = ["loss: mean of the last tenth of the steps; differences are of the same steps."]
    if comparison.unlike:
        more = len(comparison.unlike) - _SHOWN
        lines.append(
            f"The runs differ in {', '.join(comparison.unlike[:_SHOWN])}"
            + (f" and {more} more keys" if more > 0 else "")
            + ": what the table shows is not the recipes' doing alone."
        )
    for outcome in comparison.outcomes:
        if len(outcome.recipes) > 1:
            changes = ", ".join(f"{recipe} from step {first}" for recipe, first in outcome.recipes)
            lines.append(f"{outcome.label}: {changes}; GEMMs quantised are the mean over its steps.")
    if telemetry:
        lines.append(
            "SQNR and underflow: median over tensors, the worst in brackets, in the last step that has them."
        )
    if comparison.emulated:
        lines.append("Emulated: step times are those of CPU numerics and say nothing about a GPU.")
    return lines


def _short(value: float | None) -> str:
    """A number of GEMMs, which is whole but where it is a mean."""
    return "-" if value is None else f"{value:.1f}".removesuffix(".0")


def _fixed(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"
