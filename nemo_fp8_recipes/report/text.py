"""The report in a terminal."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nemo_fp8_recipes.report.curve import plot, trend
from nemo_fp8_recipes.report.effect import TensorEffect, earlier, effects
from nemo_fp8_recipes.report.run import Run, load

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from nemo_fp8_recipes.telemetry.alerts.alert import Alert

__all__ = ["render"]

MAX_ROWS = 60
"""Rows of the effect table; a larger model shows the layers of each kind of module together."""


def render(run_dir: str | Path, console: Console, *, all_layers: bool = False) -> None:
    """Print the report of a run: header, loss curve, manifest, and the recipe's effect on each tensor.

    Args:
        run_dir: the run directory; the run may still be going on.
        console: where to print; its width and encoding decide the layout.
        all_layers: a row for every tensor of every layer, however many there are.

    Raises:
        ReportError: not a run directory, or a file in it that is damaged or of a newer schema.
    """
    run = load(run_dir)
    unicode = (console.encoding or "").lower().startswith("utf")
    _header(run, console)
    _loss(run, console, unicode=unicode)
    if run.manifest is not None:
        console.print()
        console.print(run.manifest.table())
    _effect(run, console, unicode=unicode, all_layers=all_layers)
    _alerts(run, console)


def _header(run: Run, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    record = run.record
    table = Table.grid(padding=(0, 2))
    ended = record.get("ended")
    status = str(record.get("status", "unknown"))
    if record.get("error"):
        status += f": {record['error']}"
    rows = [
        ("run", str(run.path)),
        ("status", status + (_duration(record) if ended or record.get("status") == "running" else "")),
        ("recipe", _options(run)),
        ("device", str(record.get("device", "unknown"))),
    ]
    if len(run.manifests) > 1:
        changes = [f"{manifest.asked} from step {step}" for step, manifest in run.manifests]
        rows.append(("recipes", ", ".join(changes)))
    if run.manifest is not None:
        quantized = len(run.manifest.quantized())
        rows.append(("modules", f"{quantized} of {len(run.manifest.rows)} quantised (manifest.json)"))
    for name, value in rows:
        table.add_row(f"[bold]{name}[/bold]", escape(value))
    console.print(table)


def _options(run: Run) -> str:
    """The recipe and the options an engineer asks for first."""
    recipe = dict(run.record.get("recipe", {}))
    shown = ("fp8_format", "amax_history_len", "amax_compute_algo", "margin")
    options = ", ".join(f"{key}={recipe[key]}" for key in shown if recipe.get(key) is not None)
    return f"{run.recipe} ({options})" if options else run.recipe


def _duration(record: Mapping[str, Any]) -> str:
    ended = record.get("ended")
    try:
        first = datetime.datetime.fromisoformat(str(record.get("started")))
        last = datetime.datetime.fromisoformat(str(ended)) if ended else datetime.datetime.now(first.tzinfo)
    except (TypeError, ValueError):
        return ""
    seconds = max(0, int((last - first).total_seconds()))
    return f", {seconds // 60} min {seconds % 60} s" + ("" if ended else " so far")


def _loss(run: Run, console: Console, *, unicode: bool) -> None:
    from rich.text import Text

    losses = run.losses
    if not losses:
        console.print("\nNo step has been logged yet.")
        return
    (first, start), (last, end) = losses[0], losses[-1]
    arrow = "→" if unicode else "->"
    console.print()
    console.print(Text(f"Loss {start:.4f} {arrow} {end:.4f} (step {first} {arrow} {last})", style="bold"))
    if len(losses) > 1:
        for line in plot(losses, width=min(72, max(20, console.width - 12)), unicode=unicode):
            console.print(Text(line))
    missing = len(run.metrics) - len(losses)
    if missing:
        console.print(Text(f"{missing} steps had a loss that is not finite.", style="red"))


def _effect(run: Run, console: Console, *, unicode: bool, all_layers: bool) -> None:
    from rich.text import Text

    order = [row.module for row in run.manifest.rows] if run.manifest is not None else []
    found = effects(run.telemetry, order)
    console.print()
    if not found:
        console.print(_nothing(run))
        return
    recipes = sorted({effect.recipe for effect in found})
    steps = sorted({step for effect in found for step in effect.steps})
    arrow = "→" if unicode else "->"
    console.print(
        Text(
            f"Effect of {', '.join(recipes)} ({len(steps)} logged steps, {steps[0]} {arrow} {steps[-1]})",
            style="bold",
        )
    )
    grouped = list(_grouped(found)) if len(found) > MAX_ROWS and not all_layers else [[e] for e in found]
    console.print(_table(grouped, console, unicode=unicode))
    for line in _legend(found, grouped):
        console.print(Text(line, style="dim"))
    for one in earlier(run.telemetry):
        steps_of = f"step {one.first}" if one.first == one.last else f"steps {one.first} to {one.last}"
        console.print(
            Text(
                f"Not shown: {one.recipe} quantised {one.tensors} of these tensors before, in {steps_of}. "
                f"The store has its rows (docs/telemetry.md), and `nemo-fp8 report --html` shows them.",
                style="yellow",
            )
        )
    for line in _remarks(found):
        console.print(Text(line, style="yellow"))


def _alerts(run: Run, console: Console) -> None:
    """Each rule that was violated: how often, and its last message, which says what to do."""
    from rich.text import Text

    if not run.alerts:
        return
    console.print()
    console.print(Text(f"Alerts ({len(run.alerts)}, telemetry/alerts.jsonl)", style="bold"))
    rules: dict[str, list[Alert]] = {}
    for alert in run.alerts:
        rules.setdefault(alert.rule, []).append(alert)
    for rule, alerts in rules.items():
        first, last = alerts[0], alerts[-1]
        if len(alerts) == 1:
            when = f"in step {first.step}"
        else:
            when = f"{len(alerts)} times in steps {first.step} to {last.step}, last"
        console.print(Text.assemble((f"{rule} ", "bold yellow"), f"{when}: {last.message}"))


def _nothing(run: Run) -> str:
    if run.recipe == "bf16":
        return "The recipe is bf16: no tensor is quantised, so there is no amax or scale to show."
    if run.record.get("status") == "running":
        return (
            "No amax or scale has been written yet. The run writes them every telemetry.flush_every logging "
            "steps and when it ends; telemetry.sinks must name parquet."
        )
    return "The run wrote no amax or scale: telemetry.sinks must name parquet, and its disk have room."


def _grouped(found: Sequence[TensorEffect]) -> Iterator[list[TensorEffect]]:
    """The same tensor of all layers together, in the order of the first layer that has it."""
    groups: dict[tuple[str, str, str, str], list[TensorEffect]] = {}
    for effect in found:
        kind = ".".join("*" if part.isdigit() else part for part in effect.module.split("."))
        groups.setdefault((kind, effect.tensor, effect.recipe, effect.format), []).append(effect)
    yield from groups.values()


def _table(groups: Sequence[Sequence[TensorEffect]], console: Console, *, unicode: bool) -> Table:
    """One row a group. Where the console is too narrow, the columns that say least are left out."""
    from rich.measure import Measurement
    from rich.table import Table

    everything = _columns(groups, unicode=unicode)
    left_out: list[str] = []
    while True:
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
        shown = [column for column in everything if column.title.split(" ")[0] not in left_out]
        for column in shown:
            table.add_column(column.title, justify="right" if column.numeric else "left", no_wrap=True)
        for cells in zip(*(column.cells for column in shown), strict=True):
            table.add_row(*cells)
        width = Measurement.get(console, console.options.update(max_width=_UNLIMITED), table).maximum
        if width <= console.width or len(left_out) == len(_DISPENSABLE):
            return table
        left_out.append(_DISPENSABLE[len(left_out)])


_DISPENSABLE = ("Change", "Scale", "Trend")
_UNLIMITED = 10_000


class _Column(NamedTuple):
    title: str
    cells: list[str]
    numeric: bool = True


def _columns(groups: Sequence[Sequence[TensorEffect]], *, unicode: bool) -> list[_Column]:
    arrow = "→" if unicode else "->"
    # Of several layers the one whose amax moved most speaks for the group.
    shown = [max(group, key=lambda e: abs(math.log2(e.growth)) if e.growth > 0 else 0.0) for group in groups]
    places = [_split(effect.module) for effect in shown]
    layers, modules = [], []
    for index, (place, group) in enumerate(zip(places, groups, strict=True)):
        again = index > 0 and places[index - 1] == place
        many = f" of {len(group)}" if len(group) > 1 else ""
        layers.append("" if again else f"{place[0]}{many}")
        modules.append("" if again else place[1])
    columns = [
        _Column("Layer", layers, numeric=False),
        _Column("Module", _shortest(modules), numeric=False),
        _Column("Tensor", [effect.tensor for effect in shown], numeric=False),
        _Column("Format", [effect.format for effect in shown], numeric=False),
        _Column(
            f"Amax first {arrow} last",
            [
                f"{('≤' if unicode else '<=') if effect.bound else ''}"
                f"{_short(effect.amax[0])} {arrow} {_short(effect.amax[-1])}"
                for effect in shown
            ],
        ),
        _Column("Change", [f"x{_short(e.growth)}" if math.isfinite(e.growth) else "-" for e in shown]),
        _Column("Trend", [trend(effect.amax, unicode=unicode) for effect in shown], numeric=False),
    ]
    if any(effect.scale for effect in shown):
        columns.append(
            _Column(
                f"Scale first {arrow} last",
                [
                    f"{_short(effect.scale[0])} {arrow} {_short(effect.scale[1])}" if effect.scale else "-"
                    for effect in shown
                ],
            )
        )
    headrooms = [[e.headroom for e in group if e.headroom is not None] for group in groups]
    if any(headrooms):
        columns.append(_Column("Headroom", [f"{min(found):+.1f}" if found else "-" for found in headrooms]))
    spreads = [[e.spread for e in group if e.spread is not None] for group in groups]
    if any(spreads):
        columns.append(_Column("Blocks", [f"2^{max(found):.0f}" if found else "-" for found in spreads]))
    return columns


def _split(path: str) -> tuple[str, str]:
    """("3", "mlp.linear_fc1") of "decoder.layers.3.mlp.linear_fc1"."""
    parts = path.split(".")
    for index, part in enumerate(parts):
        if part.isdigit() and index:
            return part, ".".join(parts[index + 1 :])
    return "", path


def _shortest(modules: Sequence[str]) -> list[str]:
    """Module names without the path before their last part, where that still tells them apart."""
    names = {module: module.rsplit(".", 1)[-1] for module in modules}
    if len(set(names.values())) < len(names):
        return list(modules)
    return [names[module] for module in modules]


def _legend(found: Sequence[TensorEffect], groups: Sequence[Sequence[TensorEffect]]) -> Iterator[str]:
    if len(groups) < len(found):
        yield "All layers in one row: the one whose amax changed most, the least headroom, the widest range."
    if any(effect.bound for effect in found):
        yield "Amax is an upper bound here, from the block scales; it exceeds the true amax by less than x2."
    if any(effect.headroom is not None for effect in found):
        yield "Headroom: binades left above the scaled amax in the last step; below 0 elements saturate."
    if any(effect.spread is not None for effect in found):
        yield "Blocks: largest over smallest block scale in the last step, which a single scale has to span."


def _remarks(found: Sequence[TensorEffect]) -> Iterator[str]:
    """What an engineer should look at."""
    saturated = [effect for effect in found if effect.saturated]
    if saturated:
        worst = max(saturated, key=lambda effect: effect.saturated)
        yield (
            f"{len(saturated)} tensors saturated in some logged step, most often {worst.module} "
            f"{worst.tensor}: {worst.saturated} of {len(worst.steps)}. The first cast of a run has scale 1."
        )
    broken = [effect for effect in found if effect.non_finite]
    if broken:
        yield (
            f"{len(broken)} tensors had an amax of NaN or Inf, among them {broken[0].module} "
            f"{broken[0].tensor}; an Inf freezes a delayed scale until it leaves the history."
        )
    grown = [effect for effect in found if math.isfinite(effect.growth) and effect.growth >= 8]
    if grown:
        worst = max(grown, key=lambda effect: effect.growth)
        yield (
            f"{len(grown)} tensors grew by x8 or more, most of all {worst.module} {worst.tensor}: "
            f"x{_short(worst.growth)}."
        )


def _short(value: float) -> str:
    return f"{value:.3g}"
