"""NVFP4: the amax that stays with the quantised tensor and from which its global scale is made.

`_amax_rowwise`, fp32 (1,), or one a row with row scaling
(`transformer_engine/pytorch/tensor/storage/nvfp4_tensor_storage.py`). A tensor that has columnwise data only
keeps the amax of what was quantised: after the Hadamard transform, where the recipe has it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemo_fp8_recipes.telemetry.linears import Operand
from nemo_fp8_recipes.telemetry.probes.base import ReadingSpec, element_format
from nemo_fp8_recipes.telemetry.probes.tensorwise import TensorwiseProbe

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Nvfp4Probe"]


class Nvfp4Probe(TensorwiseProbe):
    """Largest amax of each operand over the step's micro-batches."""

    def _spec(self, operand: Operand, quantizer: Any) -> ReadingSpec:
        return ReadingSpec(operand.module, operand.tensor, "amax", "nvfp4", element_format(quantizer), "max")

    def _number(self, tensor: Any) -> Tensor:
        kept: Tensor = tensor._amax_columnwise if tensor._amax_rowwise is None else tensor._amax_rowwise
        return kept.detach() if kept.numel() == 1 else kept.detach().amax()
