"""Per-tensor current scaling: the inverse scale that stays with the quantised tensor.

amax and scale are temporaries of the quantising kernel; `_scale_inv`, fp32 (1,), is what survives
(`transformer_engine/pytorch/tensor/storage/float8_tensor_storage.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemo_fp8_recipes.telemetry.linears import Operand
from nemo_fp8_recipes.telemetry.probes.base import Probe, Reading, ReadingSpec, element_format
from nemo_fp8_recipes.telemetry.probes.index import IndexCache

__all__ = ["TensorwiseProbe"]


class TensorwiseProbe(Probe):
    """Largest `scale_inv` of each operand over the step's micro-batches: that of the largest amax."""

    def __init__(self, indices: IndexCache) -> None:
        self._indices = indices
        self._known: dict[Operand, tuple[Any, ReadingSpec]] = {}
        """What is read of an operand, and the quantizer that made it so."""
        self.begin()

    def begin(self) -> None:
        self._slots: dict[Operand, int] = {}
        self._specs: list[ReadingSpec] = []
        self._slot_of: list[int] = []
        self._waiting: list[Tensor] = []
        self._read: list[Tensor] = []

    def quantised(self, operand: Operand, quantizer: Any, tensor: Any) -> None:
        data = self._codes(tensor)
        if data is not None and not data.numel():
            return  # an expert that got no token: its scale was never written
        slot = self._slots.get(operand)
        if slot is None:
            slot = self._slots[operand] = len(self._specs)
            known = self._known.get(operand)
            if known is None or known[0] is not quantizer:
                known = self._known[operand] = (quantizer, self._spec(operand, quantizer))
            self._specs.append(known[1])
        self._slot_of.append(slot)
        # An alias, because Transformer Engine empties saved tensors. `detach` would take three times as long.
        self._waiting.append(self._number(tensor).data)

    def settle(self) -> None:
        if self._waiting:
            self._read.append(torch._C._nn.flatten_dense_tensors(self._waiting))
            self._waiting = []

    def end(self) -> Reading | None:
        if not self._specs:
            return None
        self.settle()
        found = torch.cat(self._read)
        largest = found.new_zeros(len(self._specs))
        largest.scatter_reduce_(0, self._indices.on(found.device, self._slot_of), found, "amax")
        reading = Reading(tuple(self._specs), largest)
        self.begin()
        return reading

    def _spec(self, operand: Operand, quantizer: Any) -> ReadingSpec:
        return ReadingSpec(
            operand.module,
            operand.tensor,
            "scale_inv",
            "tensorwise",
            element_format(quantizer),
            "max",
            power_of_two=bool(quantizer.force_pow_2_scales),
        )

    def _codes(self, tensor: Any) -> Tensor | None:
        """The codes of a quantised tensor, in either direction."""
        codes: Tensor | None = tensor._data if tensor._data is not None else tensor._transpose
        return codes

    def _number(self, tensor: Any) -> Tensor:
        """The one number that is read of a quantised tensor, not negative."""
        scale_inv: Tensor = tensor._scale_inv
        return scale_inv
