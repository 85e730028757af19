"""NVFP4: the amax that stays with the quantised tensor and from which its global scale is made, and the E4M3
scales of its blocks.

`_amax_rowwise`, fp32 (1,), or one a row with row scaling
(`transformer_engine/pytorch/tensor/storage/nvfp4_tensor_storage.py`). A tensor that has columnwise data only
keeps the amax of what was quantised: after the Hadamard transform, where the recipe has it.
"""

from __future__ import annotations

from typing import Any

import torch

from nemo_fp8_recipes.telemetry.groups import OneMatrix
from nemo_fp8_recipes.telemetry.linears import Operand
from nemo_fp8_recipes.telemetry.probes.base import Reading, ReadingSpec, element_format
from nemo_fp8_recipes.telemetry.probes.blocks import BlockProbe
from nemo_fp8_recipes.telemetry.probes.index import IndexCache
from nemo_fp8_recipes.telemetry.probes.tensorwise import TensorwiseProbe

__all__ = ["Nvfp4Probe"]


class Nvfp4Probe(TensorwiseProbe):
    """Largest amax of each operand over the step's micro-batches; distribution of its block scales."""

    def __init__(self, indices: IndexCache) -> None:
        self._blocks = BlockProbe(indices, "nvfp4")
        self._specs: tuple[tuple[tuple[ReadingSpec, ...], tuple[ReadingSpec, ...]], tuple[ReadingSpec, ...]]
        self._specs = ((), ()), ()
        """What was read in the last step, apart and one after the other: mostly the same again."""
        super().__init__(indices)

    def begin(self) -> None:
        super().begin()
        self._blocks.begin()
        self._of_experts: set[int] = set()
        """Places of those that wait which hold an amax of each expert."""

    def quantised(self, operand: Operand, quantizer: Any, tensor: Any) -> bool:
        if not self._blocks.quantised(operand, quantizer, tensor):
            return False
        amax = tensor._amax_rowwise
        if amax is None:
            amax = tensor._amax_columnwise
        # How many numbers they are is asked of all of them together, when nothing waits for the answer.
        if type(tensor) is OneMatrix and tensor.members == amax.numel() != 1:
            self._of_experts.add(len(self._waiting))
            self._made += [(operand, quantizer)] * tensor.members  # one of each expert
        else:
            self._made.append((operand, quantizer))
        self._waiting.append(amax.data)
        return True

    def settle(self) -> None:
        for place, amax in enumerate(self._waiting):
            if amax.numel() != 1 and place not in self._of_experts:  # one a row
                self._waiting[place] = amax.amax()
        super().settle()
        self._of_experts.clear()
        self._blocks.settle()

    def end(self) -> Reading | None:
        blocks = self._blocks.end()  # first: the other end begins a new step, of the blocks too
        amaxes = super().end()
        if amaxes is None or blocks is None:
            return amaxes or blocks
        parts, specs = self._specs
        if parts[0] is not amaxes.specs or parts[1] is not blocks.specs:
            parts, specs = self._specs = (amaxes.specs, blocks.specs), (*amaxes.specs, *blocks.specs)
        return Reading(specs, torch.cat([amaxes.values, blocks.values]))

    def _spec(self, operand: Operand, quantizer: Any) -> ReadingSpec:
        return ReadingSpec(operand.module, operand.tensor, "amax", "nvfp4", element_format(quantizer), "max")
