"""NVFP4: the amax that stays with the quantised tensor and from which its global scale is made, and the E4M3
scales of its blocks.

`_amax_rowwise`, fp32 (1,), or one a row with row scaling
(`transformer_engine/pytorch/tensor/storage/nvfp4_tensor_storage.py`). A tensor that has columnwise data only
keeps the amax of what was quantised: after the Hadamard transform, where the recipe has it.
"""

from __future__ import annotations

from typing import Any

import torch

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
        super().__init__(indices)

    def begin(self) -> None:
        super().begin()
        self._blocks.begin()

    def quantised(self, operand: Operand, quantizer: Any, tensor: Any) -> None:
        data, amax = tensor._rowwise_data, tensor._amax_rowwise
        if data is None:
            data = tensor._columnwise_data
        if data is None or data.numel():  # not an expert that got no token
            if amax is None:
                amax = tensor._amax_columnwise
            if amax.numel() == 1:
                self._made.append((operand, quantizer))
                self._waiting.append(amax.data)
            elif (members := getattr(tensor, "members", 1)) == amax.numel():
                self._made += [(operand, quantizer)] * members  # one of each expert
                self._waiting.append(amax.data)
            else:  # one a row
                self._made.append((operand, quantizer))
                self._waiting.append(amax.detach().amax().data)
        self._blocks.quantised(operand, quantizer, tensor)

    def settle(self) -> None:
        super().settle()
        self._blocks.settle()

    def end(self) -> Reading | None:
        blocks = self._blocks.end()  # first: the other end begins a new step, of the blocks too
        readings = [reading for reading in (super().end(), blocks) if reading is not None]
        if not readings:
            return None
        return Reading(
            tuple(spec for reading in readings for spec in reading.specs),
            torch.cat([reading.values for reading in readings]),
        )

    def _spec(self, operand: Operand, quantizer: Any) -> ReadingSpec:
        return ReadingSpec(operand.module, operand.tensor, "amax", "nvfp4", element_format(quantizer), "max")
