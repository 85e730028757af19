"""What differs between two manifests, as a table: layers that differ alike share a line."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from nemo_fp8_recipes.injection.rows import Difference, OperandRow
from nemo_fp8_recipes.injection.table import layer_ranges, split_layer

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["lines", "render"]


def render(differences: Sequence[Difference]) -> RenderableType:
    """A rich table of the differences."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    for column in ("Layers", "Module", "Field", "Before", "After"):
        table.add_column(column, overflow="fold")
    for line in lines(differences):
        table.add_row(*line)
    return table


def lines(differences: Sequence[Difference]) -> Iterator[tuple[str, str, str, str, str]]:
    """(layers, module within its layer, field, before, after) of each line, in the order of the model."""
    grouped: dict[tuple[str, str, str, str, str], list[int]] = {}
    for difference in differences:
        prefix, layer, name = split_layer(difference.module)
        for field, before, after in _fields(difference):
            key = (prefix, name, field, before, after)
            grouped.setdefault(key, []).extend([] if layer is None else [layer])
    for (_, name, field, before, after), layers in grouped.items():
        yield layer_ranges(layers), name, field, before, after


def _fields(difference: Difference) -> Iterator[tuple[str, str, str]]:
    """The fields in which two values differ: those of an operand one by one."""
    before, after = difference.before, difference.after
    if isinstance(before, OperandRow) and isinstance(after, OperandRow):
        for field in dataclasses.fields(OperandRow):
            old, new = getattr(before, field.name), getattr(after, field.name)
            if old != new:
                yield f"{difference.field}.{field.name}", _shown(old), _shown(new)
    else:
        yield difference.field, _shown(before), _shown(after)


def _shown(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
