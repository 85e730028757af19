"""The manifest as a table that fits 80 columns: layers that do the same share a line."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from nemo_fp8_recipes.injection.cuda_graphs import CAPTURED_BY
from nemo_fp8_recipes.injection.rows import Manifest, ManifestRow

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["layer_ranges", "render", "split_layer"]

_UNSEEN = "telemetry does not see what it quantises once it is captured"


def render(manifest: Manifest) -> RenderableType:
    """A rich table of the manifest, followed by the reasons of the modules in high precision, and by what
    captures those that run as CUDA graphs.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    quantized = manifest.quantized()
    recipes = sorted({row.recipe for row in quantized})
    device = ", ".join(sorted({row.device for row in manifest.rows})) or "no device"
    by = f" by {recipes[0]}" if len(recipes) == 1 else ""
    table = Table(
        title=f"{len(quantized)} of {len(manifest.rows)} modules quantised{by}, read back on {device}",
        title_justify="left",
        pad_edge=False,
        box=None,
    )
    # One recipe everywhere is named in the title: the column would cost a line of its width in every row.
    columns = ["Layers", "Module", *(["Recipe"] if len(recipes) > 1 else []), "Input", "Weight", "Gradient"]
    for column in columns:
        table.add_column(column, overflow="fold")
    reasons: dict[str, int] = {}
    for layers, name, row in _groups(manifest):
        if row.quantized and row.cuda_graph is not None:
            captured = f"runs as {CAPTURED_BY.get(row.cuda_graph, row.cuda_graph)}: {_UNSEEN}"
            name += f" [{reasons.setdefault(captured, len(reasons) + 1)}]"
        if row.quantized:
            operands = [str(operand or "") for operand in (row.input, row.weight, row.grad_output)]
            table.add_row(layers, Text(name), *([row.recipe] if len(recipes) > 1 else []), *operands)
        else:
            note = reasons.setdefault(row.reason or "", len(reasons) + 1)
            table.add_row(layers, Text(name), Text(f"bf16 [{note}]"), style="dim")
    notes = [Text(f"[{number}] {reason}", style="dim") for reason, number in reasons.items()]
    return Group(table, *notes)


def _groups(manifest: Manifest) -> list[tuple[str, str, ManifestRow]]:
    """(layers, module within its layer, row) of each line, in the order of the model."""
    lines: dict[tuple[str, ManifestRow], list[int]] = {}
    for row in manifest.rows:
        prefix, layer, name = split_layer(row.module)
        # Two rows share a line when all that differs is the number of the layer.
        key = (name if layer is not None else row.module, dataclasses.replace(row, module=prefix))
        lines.setdefault(key, []).extend([] if layer is None else [layer])
    return [(layer_ranges(layers), name, row) for (name, row), layers in lines.items()]


def split_layer(path: str) -> tuple[str, int | None, str]:
    """("decoder.layers", 3, "mlp.linear_fc1") of "decoder.layers.3.mlp.linear_fc1"."""
    parts = path.split(".")
    for index, part in enumerate(parts):
        if part.isdigit() and index:
            return ".".join(parts[:index]), int(part), ".".join(parts[index + 1 :])
    return "", None, path


def layer_ranges(numbers: list[int]) -> str:
    """ "0-3,5" of [0, 1, 2, 3, 5]."""
    pieces: list[list[int]] = []
    for number in sorted(set(numbers)):
        if pieces and number == pieces[-1][-1] + 1:
            pieces[-1].append(number)
        else:
            pieces.append([number])
    return ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in pieces)
