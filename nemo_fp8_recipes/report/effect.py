"""What the recipe did to each tensor, summed up over the logged steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_fp8_recipes.telemetry.series import FP8_MAX, TENSORS, WHATIF

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Earlier", "TensorEffect", "earlier", "effects", "operand_order"]

_ROUNDS_TO_MAX = {"e4m3": 464.0 / 448.0, "e5m2": 61440.0 / 57344.0}
"""Scaled values up to this multiple of the largest value lose no more than any value does by rounding."""


@dataclass(frozen=True)
class TensorEffect:
    """One operand of one GEMM over the logged steps.

    Attributes:
        module, tensor: which operand.
        recipe: canonical name of the recipe that quantised it last.
        format: its element format then.
        steps: logged steps in which this recipe quantised it, ascending.
        amax: amax in each of them; an upper bound in all of them where `bound`.
        bound: most steps know only a bound of the amax (block scales, scales rounded to powers of two), so
            the bound is what can be followed over all of them.
        scale: first and last scale, None under block scaling.
        headroom: binades between the scaled amax and the format's largest value in the last step:
            log2(fp8_max / (amax x scale)); below 0 the largest elements saturated. None under block scaling,
            where each block uses its range by construction.
        saturated: logged steps whose amax, under the scale in force, lay so far beyond the format's largest
            value that more was lost than by rounding. Delayed scaling only.
        spread: binades between the largest and the smallest block scale in the last step: the range that one
            scale for the whole tensor would have to cover. None for per-tensor scaling.
        window: the last amax history window, oldest first; None unless delayed.
        non_finite: logged steps whose amax was NaN or Inf.
    """

    module: str
    tensor: str
    recipe: str
    format: str
    steps: tuple[int, ...]
    amax: tuple[float, ...]
    bound: bool
    scale: tuple[float, float] | None
    headroom: float | None
    saturated: int
    spread: float | None
    window: tuple[float, ...] | None
    non_finite: int

    @property
    def growth(self) -> float:
        """Last amax over the first, NaN when that says nothing."""
        first, last = self.amax[0], self.amax[-1]
        return last / first if first > 0 and math.isfinite(first) and math.isfinite(last) else math.nan


@dataclass(frozen=True)
class Earlier:
    """Rows of the store that `effects` leaves out: of a recipe that no longer quantises these tensors.

    Attributes:
        recipe: canonical name.
        first, last: logged steps, both included.
        tensors: number of operands.
    """

    recipe: str
    first: int
    last: int
    tensors: int


def earlier(table: pa.Table) -> list[Earlier]:
    """What a telemetry table holds beside the last recipe of each tensor, in the order of its steps."""
    kinds: dict[tuple[str, str], dict[tuple[str, str], tuple[int, int]]] = {}
    columns = [
        table.column(name).to_pylist() for name in ("step", "module", "tensor", "stat", "recipe", "format")
    ]
    for step, module, tensor, stat, recipe, fmt in zip(*columns, strict=True):
        if not stat.startswith(f"{WHATIF}/"):
            spans = kinds.setdefault((module, tensor), {})
            first, last = spans.get((recipe, fmt), (step, step))
            spans[recipe, fmt] = (min(first, step), max(last, step))
    found: dict[str, list[tuple[int, int]]] = {}
    for spans in kinds.values():
        newest = max(last for _, last in spans.values())
        for (recipe, _), span in spans.items():
            if span[1] != newest:
                found.setdefault(recipe, []).append(span)
    return sorted(
        (
            Earlier(recipe, min(first for first, _ in spans), max(last for _, last in spans), len(spans))
            for recipe, spans in found.items()
        ),
        key=lambda one: (one.first, one.recipe),
    )


def effects(table: pa.Table, order: Sequence[str] = ()) -> list[TensorEffect]:
    """The effect on every operand in a telemetry table.

    Args:
        table: from `store.read`.
        order: module paths in the order of the model; modules that are not among them come by name.
    """
    position = {module: index for index, module in enumerate(order)}
    # operand -> (stat -> step -> value)
    numbers: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    kinds: dict[tuple[str, str], tuple[int, str, str]] = {}
    windows: dict[tuple[str, str], tuple[int, tuple[float, ...]]] = {}
    columns = [table.column(name).to_pylist() for name in table.column_names]
    rows = [
        row
        for row in zip(*columns, strict=True)
        if not row[3].startswith(f"{WHATIF}/")  # such a row names the recipe that it asks about
    ]
    for step, module, tensor, _, recipe, fmt, _, _ in rows:
        if (module, tensor) not in kinds or kinds[module, tensor][0] <= step:
            kinds[module, tensor] = (step, recipe, fmt)
    for step, module, tensor, stat, recipe, fmt, value, values in rows:
        key = (module, tensor)
        if (recipe, fmt) != kinds[key][1:]:
            continue  # of an earlier recipe: its amax and scales are no beginning of this one's
        if values is not None:
            if key not in windows or windows[key][0] <= step:
                windows[key] = (step, tuple(values))
        elif value is not None:
            numbers.setdefault(key, {}).setdefault(stat, {})[step] = value
    return [
        _effect(key, kinds[key][1:], numbers[key], windows.get(key, (0, None))[1])
        for key in sorted(numbers, key=lambda key: (position.get(key[0], len(position)), operand_order(key)))
        if "amax" in numbers[key] or "amax_bound" in numbers[key]
    ]


def _effect(
    key: tuple[str, str],
    kind: tuple[str, str],
    stats: Mapping[str, Mapping[int, float]],
    window: tuple[float, ...] | None,
) -> TensorEffect:
    recipe, fmt = kind
    # A step that reads the tensors knows the amax too; beside bounds of other steps it would show as a jump.
    exact, bounds = stats.get("amax", {}), stats.get("amax_bound", {})
    bound = bool(bounds.keys() - exact.keys())
    amax = {**exact, **bounds} if bound else {**bounds, **exact}
    steps = sorted(amax)
    last = steps[-1]
    largest = FP8_MAX.get(fmt, math.nan)
    scales = stats.get("scale", {})
    # How far the scaled amax lies below the largest value, in the steps that have both.
    ratios = {step: amax[step] * scales[step] / largest for step in steps if step in scales}
    ratio = ratios.get(last, 0.0)
    scaled = sorted(scales)
    low, high = stats.get("scale_inv_min", {}).get(last, 0.0), stats.get("scale_inv_max", {}).get(last, 0.0)
    return TensorEffect(
        module=key[0],
        tensor=key[1],
        recipe=recipe,
        format=fmt,
        steps=tuple(steps),
        amax=tuple(amax[step] for step in steps),
        bound=bound,
        scale=(scales[scaled[0]], scales[scaled[-1]]) if scaled else None,
        headroom=-math.log2(ratio) if recipe == "delayed" and 0 < ratio < math.inf else None,
        saturated=sum(ratio > _ROUNDS_TO_MAX.get(fmt, 1.0) for ratio in ratios.values())
        if recipe == "delayed"
        else 0,
        spread=math.log2(high / low) if 0 < low <= high < math.inf else None,
        window=window,
        non_finite=sum(not math.isfinite(value) for value in amax.values()),
    )


def operand_order(key: tuple[str, str]) -> tuple[list[tuple[int, int, str]], int]:
    """Sort key of a (module, tensor). Numbers in a path compare as numbers: layer 10 comes after layer 9."""
    module, tensor = key
    path = [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in module.split(".")]
    return path, TENSORS.index(tensor) if tensor in TENSORS else len(TENSORS)
