"""What the other recipes would have done to a tensor: `numerics/` quantises it again, on its own device.

Every recipe has its default options and the format these give the operand. Blocks lie along the rows, as for
the forward and the input-gradient GEMM. Delayed scaling takes its scale from the amax history that was
recorded of the tensor itself, one entry a logging step. What was recorded is read out too, each rank's own
amax, so that a run that goes on can make its histories anew from what it logged before.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nemo_fp8_recipes import recipes
from nemo_fp8_recipes.numerics import FORMATS, amax, blockwise, delayed, mxfp8, nvfp4, tensorwise
from nemo_fp8_recipes.numerics.cast import decode
from nemo_fp8_recipes.numerics.formats import E4M3
from nemo_fp8_recipes.numerics.fp4 import E2M1_MAX
from nemo_fp8_recipes.telemetry.elements import measure
from nemo_fp8_recipes.telemetry.linears import Operand
from nemo_fp8_recipes.telemetry.probes.base import Reading, ReadingSpec
from nemo_fp8_recipes.telemetry.probes.elements import ElementSums
from nemo_fp8_recipes.telemetry.probes.index import IndexCache
from nemo_fp8_recipes.telemetry.probes.stored import Stored, per_block_limit

if TYPE_CHECKING:
    import numpy as np

__all__ = ["RECIPES", "RECORDED", "Recorded", "WhatIf"]

RECIPES = tuple(name for name in recipes.names() if name != "bf16")

RECORDED = "amax_by_rank"
"""Name of the reading that holds what each rank recorded for delayed scaling's histories."""

_NOTHING = -1.0
"""In the place of a rank that recorded nothing: below every amax."""


class Recorded(NamedTuple):
    """What the ranks recorded of a tensor in one logging step.

    Attributes:
        values: fp32 (ranks,), the amax of the tensor on each rank; negative where it had none.
    """

    step: int
    operand: Operand
    values: np.ndarray


@dataclass
class _Delayed:
    """What delayed scaling would know of a tensor.

    Attributes:
        fp8_max: of the format it has for the tensor.
        history: fp32 (length, 1), as `numerics.delayed` keeps it.
        scale: fp32 (1,).
        amax: the largest amax of this step so far, fp32 (1,).
        updates: how many steps the history has seen.
    """

    fp8_max: float
    history: Tensor
    scale: Tensor
    amax: Tensor | None = None
    updates: int = 0


class WhatIf:
    """Judges chosen tensors under every recipe but the one that quantises them.

    Args:
        chosen: globs over `<module>/<tensor>`, such as `decoder.layers.0.*/input`.
        rank, ranks: which one of how many this is.
    """

    def __init__(self, chosen: Sequence[str], indices: IndexCache, *, rank: int = 0, ranks: int = 1) -> None:
        self.chosen = tuple(chosen)
        self._rank, self._ranks = rank, ranks
        self._sums = ElementSums(indices)
        self._matches: dict[Operand, bool] = {}
        self._delayed: dict[Operand, _Delayed] = {}
        self._plans = {name: recipes.load(name).operands() for name in RECIPES}

    def wants(self, operand: Operand) -> bool:
        """Whether the operand is one of the chosen."""
        found = self._matches.get(operand)
        if found is None:
            name = f"{operand.module}/{operand.tensor}"
            found = self._matches[operand] = any(fnmatchcase(name, glob) for glob in self.chosen)
        return found

    def quantised(self, operand: Operand, recipe: str, source: Tensor, *, judge: bool) -> None:
        """`recipe` quantised `source` in this logging step; `judge`: and the others are to be tried."""
        if source.numel() == 0:
            return
        with torch.no_grad():
            if recipe != "delayed":
                self._record(operand, source)
            if judge:
                self._judge(operand, recipe, source.detach().reshape(-1, source.shape[-1]))

    def end(self) -> Reading | None:
        """The logging step is over: what it showed. Its amax becomes the newest entry of the histories."""
        readings = [reading for reading in (self._sums.end(), self._recorded()) if reading is not None]
        self._roll()
        if not readings:
            return None
        return Reading(
            tuple(spec for reading in readings for spec in reading.specs),
            torch.cat([reading.values for reading in readings]),
        )

    def restore(self, recorded: Iterable[Recorded], device: torch.device) -> None:
        """Make the histories what they were after these steps; what was recorded since is forgotten.

        Args:
            recorded: steps ascending. With another number of ranks than now, every rank takes the largest
                amax of them, as delayed scaling's own reduction would.
            device: where the model is.
        """
        self._delayed = {}
        rows = [
            (row, value)
            for row in recorded
            if self.wants(row.operand) and (value := self._mine(row.values)) is not None
        ]
        values = torch.tensor([value for _, value in rows], dtype=torch.float32).to(device)
        numbered = enumerate(row for row, _ in rows)
        with torch.no_grad():
            for _, of_step in itertools.groupby(numbered, key=lambda one: one[1].step):
                for number, row in of_step:
                    self._state(row.operand, values[:1]).amax = values[number : number + 1]
                self._roll()

    def _mine(self, values: np.ndarray) -> np.float32 | None:
        """This rank's part of what was recorded; None where there was none."""
        value: np.float32 = values[self._rank] if len(values) == self._ranks else values.max()
        return None if value < 0 else value

    def _recorded(self) -> Reading | None:
        """What this rank recorded in the step, in its place among the ranks."""
        found = [(operand, state) for operand, state in self._delayed.items() if state.amax is not None]
        if not found:
            return None
        newest = torch.cat([state.amax for _, state in found if state.amax is not None])
        table = newest.new_full((len(found), self._ranks), _NOTHING)
        table[:, self._rank] = newest
        specs = tuple(
            ReadingSpec(
                operand.module,
                operand.tensor,
                RECORDED,
                "delayed",
                self._format("delayed", operand),
                "max",
                length=self._ranks,
                whatif=True,
            )
            for operand, _ in found
        )
        return Reading(specs, table.reshape(-1))

    def _roll(self) -> None:
        """The amax of the step becomes the newest entry of the histories."""
        by_format: dict[float, list[_Delayed]] = {}
        for state in self._delayed.values():
            if state.amax is not None:
                by_format.setdefault(state.fp8_max, []).append(state)
        for fp8_max, states in by_format.items():
            newest = torch.cat([state.amax for state in states if state.amax is not None])
            delayed.update_amax_and_scale(
                [state.history for state in states],
                [state.scale for state in states],
                newest,
                algorithm="max",
                fp8_max=fp8_max,
            )
            for state in states:
                state.amax = None
                state.updates += 1

    def _record(self, operand: Operand, source: Tensor) -> None:
        now = amax(source).reshape(1)
        state = self._state(operand, now)
        state.amax = now if state.amax is None else torch.maximum(state.amax, now)

    def _state(self, operand: Operand, like: Tensor) -> _Delayed:
        """What delayed scaling knows of an operand; an empty history on the device of `like` at first."""
        state = self._delayed.get(operand)
        if state is None:
            length = int(recipes.load("delayed").to_dict()["amax_history_len"])
            fp8_max = FORMATS[self._format("delayed", operand)].max
            state = _Delayed(fp8_max, like.new_zeros((length, 1)), torch.ones_like(like))
            self._delayed[operand] = state
        return state

    def _judge(self, operand: Operand, recipe: str, x: Tensor) -> None:
        for other in RECIPES:
            if other == recipe:
                continue
            fmt = self._format(other, operand)
            if other == "delayed":
                state = self._delayed[operand]
                if not state.updates:
                    continue  # nothing was recorded yet
                found: Stored | None = _under_delayed(x, fmt, state.scale)
            else:
                found = _SIMULATORS[other](x, operand.tensor, fmt)
            if found is not None:
                key = ReadingSpec(operand.module, operand.tensor, "", other, fmt, "mean", whatif=True)
                self._sums.add(key, measure(x, found.values, found.limit))

    def _format(self, recipe: str, operand: Operand) -> str:
        return next(plan.format for name, plan in self._plans[recipe].items() if name == operand.tensor)


def _tensorwise(x: Tensor, _: str, fmt: str) -> Stored | None:
    made = tensorwise.quantize_current(x, FORMATS[fmt])
    return Stored(
        tensorwise.dequantize(made.codes, made.scale_inv, FORMATS[fmt]), made.scale_inv * FORMATS[fmt].max
    )


def _under_delayed(x: Tensor, fmt: str, scale: Tensor) -> Stored:
    made = delayed.quantize_delayed(x, FORMATS[fmt], scale)
    return Stored(
        tensorwise.dequantize(made.codes, made.scale_inv, FORMATS[fmt]), made.scale_inv * FORMATS[fmt].max
    )


def _blockwise(x: Tensor, tensor: str, fmt: str) -> Stored | None:
    if tensor == "weight":
        made, block = blockwise.quantize_2d(x, FORMATS[fmt]), (blockwise.BLOCK, blockwise.BLOCK)
        values = blockwise.dequantize_2d(*made, FORMATS[fmt])
    else:
        made, block = blockwise.quantize_1d(x, FORMATS[fmt]), (1, blockwise.BLOCK)
        values = blockwise.dequantize_1d(*made, FORMATS[fmt])
    return Stored(values, per_block_limit(made.scale_inv, FORMATS[fmt].max, block, x.shape))


def _mxfp8(x: Tensor, _: str, fmt: str) -> Stored | None:
    made = mxfp8.quantize_rowwise(x, FORMATS[fmt])
    scale_inv = mxfp8.e8m0_to_fp32(made.scale_e8m0)
    return Stored(
        mxfp8.dequantize_rowwise(*made, FORMATS[fmt]),
        per_block_limit(scale_inv, FORMATS[fmt].max, (1, mxfp8.BLOCK), x.shape),
    )


def _nvfp4(x: Tensor, tensor: str, _: str) -> Stored | None:
    if x.shape[1] % nvfp4.BLOCK:
        return None  # NVFP4 cannot quantise it
    largest = amax(x).reshape(1)
    if tensor == "weight":
        made, block = nvfp4.quantize_2d(x, largest), (nvfp4.BLOCK, nvfp4.BLOCK)
    else:
        # Rounded to nearest also where the recipe rounds gradients stochastically: the same in every run.
        made, block = nvfp4.quantize_1d(x, largest), (1, nvfp4.BLOCK)
    scale_inv = decode(made.scale_e4m3, E4M3).mul_(largest).mul_(1.0 / (E4M3.max * E2M1_MAX))
    return Stored(nvfp4.dequantize(*made, largest), per_block_limit(scale_inv, E2M1_MAX, block, x.shape))


_SIMULATORS: dict[str, Callable[[Tensor, str, str], Stored | None]] = {
    "tensorwise": _tensorwise,
    "blockwise": _blockwise,
    "mxfp8": _mxfp8,
    "nvfp4": _nvfp4,
}
