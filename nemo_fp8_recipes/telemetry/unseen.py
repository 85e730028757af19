"""Marks of what did not pass by in a step: what a replayed CUDA graph quantises passes no function that could
be watched, of several experts that are quantised at once only what lies as one matrix can be read, and an
operation may keep a function from a time when nobody watched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from nemo_fp8_recipes.injection.cuda_graphs import graphed_modules
from nemo_fp8_recipes.injection.operands import recipe_of
from nemo_fp8_recipes.injection.operations import OperationLinear
from nemo_fp8_recipes.telemetry.linears import Linear
from nemo_fp8_recipes.telemetry.owners import Owned, Owners
from nemo_fp8_recipes.telemetry.probes.base import Reading, ReadingSpec, element_format

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Unseen"]


class Unseen:
    """Marks the modules whose quantising calls did not pass by.

    `unobserved` are the operands of which nothing was read, and `graphed` all of a module that runs as a CUDA
    graph: of it there is what Transformer Engine keeps in its buffers (delayed scaling's state, cached
    weights) and nothing else. Of a `GroupedLinear(use_grouped_tensor=True)` and of the operation of that
    name, which quantise all experts' inputs with one quantizer into one tensor
    (`transformer_engine/pytorch/module/grouped_linear.py`), inputs and gradients are missing where these are
    quantised columnwise alone. Operations keep the function that fuses an activation's gradient with the bias
    gradient (`ops/fused/backward_activation_bias.py`): what it quantises is not seen.

    Args:
        model: the model, wrapped or not, or Megatron's list of virtual-pipeline chunks.
    """

    def __init__(self, model: nn.Module | Sequence[nn.Module]) -> None:
        self._model = model
        self._graphed: tuple[frozenset[int], frozenset[int]] | None = None
        """Modules of which nothing was seen when last there were any, and those of them that run as CUDA
        graphs.
        """
        self._of_linear: Mapping[str, Mapping[str, Owned]] | None = None
        self._telling: tuple[Owned, ...] | None = None
        """The operands that say of those in `_of_linear` that everything passed by, where they were all seen.
        """

    def reading(
        self, linears: Sequence[Linear], owners: Owners, step: int, readings: Sequence[Reading]
    ) -> Reading | None:
        """The marks of a step, 1 each; None where everything passed by.

        Args:
            linears: the GEMMs of the model.
            owners: what was seen of their operands.
            step: the step as `owners` knows it.
            readings: what was read in it.
        """
        of_linear = owners.of_linear
        if self._of_linear is not of_linear:
            self._of_linear, self._telling = of_linear, _telling(linears, owners)
        if self._telling is not None:
            for owned in self._telling:
                if owned.seen != step:
                    break
            else:
                return None
        unseen = []
        for linear in linears:
            partly = _partly(linear)
            seen = [owned.seen == step for owned in of_linear.get(linear.path, {}).values()]
            passed_by = all(seen) and bool(seen) if partly else any(seen)
            if not passed_by and linear.module.fp8 and linear.module.training:
                unseen.append(linear)
        if not unseen:
            return None
        known = {(spec.module, spec.tensor) for reading in readings for spec in reading.specs}
        for linear in unseen:  # an expert without tokens is seen, and nothing is read of it
            those = of_linear.get(linear.path, {}).values()
            known |= {owned.operand for owned in those if owned.seen == step}
        modules = frozenset(id(linear.module) for linear in unseen)
        if self._graphed is None or self._graphed[0] != modules:
            self._graphed = (modules, modules & graphed_modules(self._model).keys())
        specs = []
        for linear in unseen:
            for tensor, quantizer in dict(linear.quantizers()).items():
                if quantizer is None:
                    continue
                marks = ["graphed"] if id(linear.module) in self._graphed[1] else []
                marks += ["unobserved"] if (linear.path, tensor) not in known else []
                recipe, fmt = recipe_of(quantizer), element_format(quantizer)
                specs += [ReadingSpec(linear.path, tensor, mark, recipe, fmt, "max") for mark in marks]
        if not specs:
            return None
        device = next(unseen[0].module.parameters()).device
        return Reading(tuple(specs), torch.ones(len(specs), device=device))


def _partly(linear: Linear) -> bool:
    """Whether some operands of the linear may pass by and others not."""
    return isinstance(linear.module, OperationLinear) or bool(
        getattr(linear.module, "use_grouped_tensor", False)
    )


def _telling(linears: Sequence[Linear], owners: Owners) -> tuple[Owned, ...] | None:
    """One operand of each linear, or all; None where there is one without."""
    found: list[Owned] = []
    for linear in linears:
        those = list(owners.of_linear.get(linear.path, {}).values())
        if not those:
            return None
        found += those if _partly(linear) else those[:1]
    return tuple(found)
