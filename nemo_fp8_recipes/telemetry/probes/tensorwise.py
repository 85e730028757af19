"""Per-tensor current scaling: the inverse scale that stays with the quantised tensor.

amax and scale are temporaries of the quantising kernel; `_scale_inv`, fp32 (1,), is what survives
(`transformer_engine/pytorch/tensor/storage/float8_tensor_storage.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
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
        self._known: tuple[list[tuple[Operand, Any]], tuple[ReadingSpec, ...], np.ndarray] | None = None
        """What was quantised by what in the last step, what is read of it, and the slot of each tensor."""
        self.begin()

    def begin(self) -> None:
        self._made: list[tuple[Operand, Any]] = []
        self._waiting: list[Tensor] = []
        self._amaxes: list[Tensor] = []
        """Those of experts, one for each number that waits; empty as long as there are none."""
        self._read: list[Tensor] = []
        self._grouped = False

    def quantised(self, operand: Operand, quantizer: Any, tensor: Any) -> bool:
        data = tensor._data if tensor._data is not None else tensor._transpose
        if data is not None and not data.numel():
            return False  # an expert that got no token: its scale was never written
        scale_inv = tensor._scale_inv
        if scale_inv.numel() == 1:
            self._made.append((operand, quantizer))
        else:  # of a grouped tensor, one an expert
            self._grouped = True
            self._made += [(operand, quantizer)] * scale_inv.numel()
            self._amaxes += self._waiting[len(self._amaxes) :]
            self._amaxes.append(tensor.amax.data)
        # An alias, because Transformer Engine empties saved tensors. `detach` would take three times as long.
        self._waiting.append(scale_inv.data)
        return True

    def settle(self) -> None:
        if self._waiting:
            found = _joined(self._waiting)
            if self._amaxes:  # an expert without tokens has the scale 1, and an amax of 0
                self._amaxes += self._waiting[len(self._amaxes) :]
                found = found * _joined(self._amaxes).ne(0)
            self._read.append(found)
            self._waiting, self._amaxes = [], []

    def end(self) -> Reading | None:
        if not self._made:
            return None
        self.settle()
        known = self._known
        # Pairs of the same objects, in most steps: they are told by their identity.
        if known is None or known[0] != self._made:
            known = self._known = (self._made, *self._planned())
        _, specs, slots = known
        found = self._read[0] if len(self._read) == 1 else torch.cat(self._read)
        largest = found.new_zeros(len(specs))
        largest.scatter_reduce_(0, self._indices.on(found.device, slots), found, "amax")
        if self._grouped:  # no expert had anything but zeros, whose scale is 1
            largest.masked_fill_(largest == 0, 1.0)
        self.begin()
        return Reading(specs, largest)

    def _planned(self) -> tuple[tuple[ReadingSpec, ...], np.ndarray]:
        slots: dict[Operand, int] = {}
        specs: list[ReadingSpec] = []
        for operand, quantizer in self._made:
            if operand not in slots:
                slots[operand] = len(specs)
                specs.append(self._spec(operand, quantizer))
        return tuple(specs), np.asarray([slots[operand] for operand, _ in self._made], dtype=np.int64)

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


def _joined(tensors: list[Tensor]) -> Tensor:
    """The numbers of all of them, fp32 (n,)."""
    # As a rule there is one in each, in one dimension: flattening takes as long again as joining them.
    if all(one.dim() == 1 for one in tensors):
        return torch.cat(tensors)
    return torch._C._nn.flatten_dense_tensors(tensors)
