"""What the other recipes would have done to a tensor: `numerics/` quantises it again, on its own device.

Every recipe has its default options and the format these give the operand. Blocks lie along the rows, as for
the forward and the input-gradient GEMM. Delayed scaling takes its scale from the amax history that was
recorded of the tensor itself, one entry a logging step; of a tensor of all experts each has a history. What
was recorded is read out too, each rank's own amaxes, so that a run that goes on can make its histories anew
from what it logged before.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nemo_fp8_recipes import recipes
from nemo_fp8_recipes.numerics import FORMATS, delayed
from nemo_fp8_recipes.telemetry.elements import measure, spare_rows
from nemo_fp8_recipes.telemetry.groups import Experts
from nemo_fp8_recipes.telemetry.linears import Operand
from nemo_fp8_recipes.telemetry.probes.base import Reading, ReadingSpec
from nemo_fp8_recipes.telemetry.probes.elements import ElementSums
from nemo_fp8_recipes.telemetry.probes.index import IndexCache
from nemo_fp8_recipes.telemetry.probes.stored import Stored
from nemo_fp8_recipes.telemetry.simulated import SIMULATORS, largest, under_scale

if TYPE_CHECKING:
    import numpy as np

__all__ = ["RECIPES", "RECORDED", "Recorded", "WhatIf"]

RECIPES = tuple(name for name in recipes.names() if name != "bf16")

RECORDED = "amax_by_rank"
"""Name of the reading that holds what each rank recorded for delayed scaling's histories: one number a rank,
or one for each of its experts, rank by rank.
"""

_NOTHING = -1.0
"""In the place of a rank that recorded nothing: below every amax."""


class Recorded(NamedTuple):
    """What the ranks recorded of a tensor in one logging step.

    Attributes:
        values: fp32 (ranks,), the amax of the tensor on each rank, or (ranks x experts of a rank,); negative
            where a rank had none.
    """

    step: int
    operand: Operand
    values: np.ndarray


@dataclass
class _Delayed:
    """What delayed scaling would know of a tensor.

    Attributes:
        fp8_max: of the format it has for the tensor.
        history: fp32 (length, members), as `numerics.delayed` keeps it; a member is an expert, or the tensor.
        scale: fp32 (members,).
        amax: the largest amax of this step so far, fp32 (members,).
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
        members: by the name of a module, how many experts are quantised as one tensor there; else 1.
    """

    def __init__(
        self,
        chosen: Sequence[str],
        indices: IndexCache,
        *,
        rank: int = 0,
        ranks: int = 1,
        members: Mapping[str, int] | None = None,
    ) -> None:
        self.chosen = tuple(chosen)
        self._rank, self._ranks = rank, ranks
        self._members = members or {}
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

    def quantised(
        self,
        operand: Operand,
        recipe: str,
        source: Tensor,
        *,
        judge: bool,
        experts: Experts | None = None,
        used: Tensor | None = None,
    ) -> None:
        """`recipe` quantised `source` in this logging step; `judge`: and the others are to be tried.

        Args:
            experts: whose rows the rows of `source` are, where it is that of several experts.
            used: int64, one element: how many rows, from the first one on, count. None: all.
        """
        if source.numel() == 0:
            return
        with torch.no_grad():
            x = source.detach().reshape(-1, source.shape[-1])
            if used is not None:
                x = x.masked_fill(spare_rows(x, used), 0.0)
            if recipe != "delayed":
                self._record(operand, x, experts)
            if judge:
                self._judge(operand, recipe, x, experts, used)

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
            (row, mine)
            for row in recorded
            if self.wants(row.operand) and (mine := self._mine(row.operand, row.values)) is not None
        ]
        uploaded = torch.tensor([value for _, mine in rows for value in mine], dtype=torch.float32).to(device)
        values = uploaded.split([len(mine) for _, mine in rows])
        with torch.no_grad():
            each = zip((row for row, _ in rows), values, strict=True)
            for _, of_step in itertools.groupby(each, key=lambda one: one[0].step):
                for row, mine in of_step:
                    self._state(row.operand, mine).amax = mine
                self._roll()

    def _mine(self, operand: Operand, values: np.ndarray) -> list[float] | None:
        """This rank's part of what was recorded, one number for each member; None where there was none."""
        members = self._members.get(operand.module, 1)
        if len(values) == self._ranks * members:
            mine = values[self._rank * members : (self._rank + 1) * members]
        else:
            mine = values.max(keepdims=True).repeat(members)
        return None if mine.max() < 0 else [float(value) for value in mine]

    def _recorded(self) -> Reading | None:
        """What this rank recorded in the step, in its place among the ranks."""
        found = [(operand, state) for operand, state in self._delayed.items() if state.amax is not None]
        if not found:
            return None
        found.sort(key=lambda one: one[1].scale.numel())
        tables = []
        for members, those in itertools.groupby(found, key=lambda one: one[1].scale.numel()):
            newest = torch.stack([state.amax for _, state in those if state.amax is not None])
            table = newest.new_full((len(newest), self._ranks, members), _NOTHING)
            table[:, self._rank] = newest
            tables.append(table.reshape(-1))
        specs = tuple(
            ReadingSpec(
                operand.module,
                operand.tensor,
                RECORDED,
                "delayed",
                self._format("delayed", operand),
                "max",
                length=self._ranks * state.scale.numel(),
                whatif=True,
            )
            for operand, state in found
        )
        return Reading(specs, tables[0] if len(tables) == 1 else torch.cat(tables))

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

    def _record(self, operand: Operand, x: Tensor, experts: Experts | None) -> None:
        now = largest(x, experts)
        state = self._state(operand, now)
        state.amax = now if state.amax is None else torch.maximum(state.amax, now)

    def _state(self, operand: Operand, like: Tensor) -> _Delayed:
        """What delayed scaling knows of an operand; at first empty histories, one for each of `like`, where
        that is.
        """
        state = self._delayed.get(operand)
        if state is None:
            length = int(recipes.load("delayed").to_dict()["amax_history_len"])
            fp8_max = FORMATS[self._format("delayed", operand)].max
            state = _Delayed(fp8_max, like.new_zeros((length, like.numel())), torch.ones_like(like))
            self._delayed[operand] = state
        return state

    def _judge(
        self, operand: Operand, recipe: str, x: Tensor, experts: Experts | None, used: Tensor | None
    ) -> None:
        for other in RECIPES:
            if other == recipe:
                continue
            fmt = self._format(other, operand)
            if other == "delayed":
                state = self._delayed[operand]
                if not state.updates:
                    continue  # nothing was recorded yet
                found: Stored | None = under_scale(x, fmt, state.scale, experts)
            else:
                found = SIMULATORS[other](x, operand.tensor, fmt, experts)
            if found is not None:
                key = ReadingSpec(operand.module, operand.tensor, "", other, fmt, "mean", whatif=True)
                self._sums.add(key, measure(x, found.values, found.limit, used=used))

    def _format(self, recipe: str, operand: Operand) -> str:
        return next(plan.format for name, plan in self._plans[recipe].items() if name == operand.tensor)
