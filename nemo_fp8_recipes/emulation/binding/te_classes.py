"""Transformer Engine's Python classes that its C++ recognises by exact type.

Follows `init_extension` in `pytorch/csrc/extensions/pybind.cpp` and `pytorch/csrc/pybind.h`. They are
imported on first use, because TE's Python modules import the binding.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from nemo_fp8_recipes.emulation.binding.releases import release

__all__ = ["TeClasses", "element_type", "scaling_mode", "te_classes"]


class TeClasses(NamedTuple):
    """Quantizers, and the storage and public tensor class that each makes."""

    quantized_storage: Any
    delayed_quantizer: Any
    tensorwise_quantizer: Any
    float8_storage: Any
    float8_tensor: Any
    mxfp8_quantizer: Any
    mxfp8_storage: Any
    mxfp8_tensor: Any
    blockwise_quantizer: Any
    blockwise_storage: Any
    blockwise_tensor: Any
    nvfp4_quantizer: Any
    nvfp4_storage: Any
    nvfp4_tensor: Any


@cache
def te_classes() -> TeClasses:
    """TE's classes; needs `transformer_engine.pytorch` to be importable."""
    from transformer_engine.pytorch.quantized_tensor import QuantizedTensorStorage
    from transformer_engine.pytorch.tensor import (
        float8_blockwise_tensor,
        float8_tensor,
        mxfp8_tensor,
        nvfp4_tensor,
    )
    from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import (
        Float8BlockwiseQTensorStorage,
    )
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage
    from transformer_engine.pytorch.tensor.storage.mxfp8_tensor_storage import MXFP8TensorStorage
    from transformer_engine.pytorch.tensor.storage.nvfp4_tensor_storage import NVFP4TensorStorage

    return TeClasses(
        quantized_storage=QuantizedTensorStorage,
        delayed_quantizer=float8_tensor.Float8Quantizer,
        tensorwise_quantizer=float8_tensor.Float8CurrentScalingQuantizer,
        float8_storage=Float8TensorStorage,
        float8_tensor=float8_tensor.Float8Tensor,
        mxfp8_quantizer=mxfp8_tensor.MXFP8Quantizer,
        mxfp8_storage=MXFP8TensorStorage,
        mxfp8_tensor=mxfp8_tensor.MXFP8Tensor,
        blockwise_quantizer=float8_blockwise_tensor.Float8BlockQuantizer,
        blockwise_storage=Float8BlockwiseQTensorStorage,
        blockwise_tensor=float8_blockwise_tensor.Float8BlockwiseQTensor,
        nvfp4_quantizer=nvfp4_tensor.NVFP4Quantizer,
        nvfp4_storage=NVFP4TensorStorage,
        nvfp4_tensor=nvfp4_tensor.NVFP4Tensor,
    )


def element_type(tag: Any) -> Any:
    """An element type as TE's Python holds it: its own `DType` where it has one, else the binding's."""
    if not release().python_dtype:
        return tag
    from transformer_engine.pytorch.constants import DType

    return DType.cast(tag)


def scaling_mode(tensor: Any) -> str:
    """What errors of TE's C++ call the scaling of a quantised tensor."""
    classes = te_classes()
    if isinstance(tensor, classes.mxfp8_storage):
        return "NVTE_MXFP8_1D_SCALING"
    if isinstance(tensor, classes.nvfp4_storage):
        return "NVTE_NVFP4_1D_SCALING"
    if isinstance(tensor, classes.blockwise_storage):
        return "NVTE_BLOCK_SCALING_2D" if tensor._is_2D_scaled else "NVTE_BLOCK_SCALING_1D"
    return "NVTE_DELAYED_TENSOR_SCALING"
