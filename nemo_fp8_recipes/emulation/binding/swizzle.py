"""Block scales in the order that the GEMM reads.

Follows `pytorch/csrc/extensions/swizzle.cpp` of Transformer Engine. Of the emulated formats MXFP8 and
NVFP4 have such an order; for every other tensor these functions do nothing, as in C++. NVFP4's columnwise
scales are those of the transposed matrix, so both directions are swizzled alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo_fp8_recipes.emulation.binding.checks import nvte_check
from nemo_fp8_recipes.emulation.binding.mxfp8 import swizzle
from nemo_fp8_recipes.emulation.binding.releases import release
from nemo_fp8_recipes.emulation.binding.te_classes import te_classes

__all__ = [
    "multi_tensor_swizzle_scales_for_gemm_",
    "multi_tensor_swizzle_scales_for_gemm_unchecked_",
    "swizzle_scales_for_gemm_",
]


def swizzle_scales_for_gemm_(tensor: Any) -> None:
    """Replace the scales of a tensor by swizzled ones, unless they are already."""
    if not _needs_order(tensor):
        return
    if tensor._rowwise_scale_inv is not None:
        tensor._rowwise_scale_inv = swizzle(tensor._rowwise_scale_inv, columnwise=False)
    if tensor._columnwise_scale_inv is not None:
        tensor._columnwise_scale_inv = swizzle(
            tensor._columnwise_scale_inv, columnwise=_along_columns(tensor)
        )
    tensor._with_gemm_swizzled_scales = True


def multi_tensor_swizzle_scales_for_gemm_(
    tensors: Sequence[Any], rowwise_usage: bool, columnwise_usage: bool
) -> None:
    """Swizzle the scales of one direction. The tensors are not marked: the caller does that once it has done
    both.
    """
    nvte_check(
        rowwise_usage != columnwise_usage,
        "pytorch/csrc/extensions/swizzle.cpp",
        "Expect exactly one of rowwise_usage and columnwise_usage.",
    )
    name = "_rowwise_scale_inv" if rowwise_usage else "_columnwise_scale_inv"
    for tensor in tensors:
        if not _needs_order(tensor):
            continue
        scales = getattr(tensor, name)
        if scales is not None:
            setattr(tensor, name, swizzle(scales, columnwise=columnwise_usage and _along_columns(tensor)))


def _needs_order(tensor: Any) -> bool:
    classes = te_classes()
    ordered = isinstance(tensor, (classes.mxfp8_storage, classes.nvfp4_storage))
    return ordered and not release().field(tensor, "with_gemm_swizzled_scales")


def _along_columns(tensor: Any) -> bool:
    """Whether columnwise scales lie as the matrix does, not as its transpose."""
    return isinstance(tensor, te_classes().mxfp8_storage)


# The C++ variant skips checks of the scales' shapes.
multi_tensor_swizzle_scales_for_gemm_unchecked_ = multi_tensor_swizzle_scales_for_gemm_
