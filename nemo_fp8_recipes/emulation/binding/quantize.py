"""Quantising and dequantising tensors.

Follows `pytorch/csrc/extensions/cast.cpp`, `extensions/bias.cpp`, `extensions/recipe.cpp` (`compute_amax`),
`common/cast/dispatch/quantize.cuh` and `common/cast/dispatch/dequantize.cuh` of Transformer Engine.
"""

# ruff: noqa: ARG001  # signatures are pybind's
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.binding import operands
from nemo_fp8_recipes.emulation.binding.blockwise import BLOCKWISE
from nemo_fp8_recipes.emulation.binding.checks import not_emulated, nvte_check, nvte_error
from nemo_fp8_recipes.emulation.binding.device import sm_arch
from nemo_fp8_recipes.emulation.binding.dtypes import element_format, require_high_precision, torch_dtype
from nemo_fp8_recipes.emulation.binding.mxfp8 import MXFP8
from nemo_fp8_recipes.emulation.binding.nvfp4 import NVFP4, fuses_amax
from nemo_fp8_recipes.emulation.binding.overwrite import overwrite
from nemo_fp8_recipes.emulation.binding.per_tensor import CURRENT, DELAYED, amax_of
from nemo_fp8_recipes.emulation.binding.releases import release
from nemo_fp8_recipes.emulation.binding.storage import Buffers, Layout, adapt, allocate, store
from nemo_fp8_recipes.emulation.binding.swizzle import swizzle_scales_for_gemm_
from nemo_fp8_recipes.emulation.binding.te_classes import scaling_mode, te_classes
from nemo_fp8_recipes.emulation.trace import QuantizeRecord, observers

__all__ = [
    "bgrad_quantize",
    "compute_amax",
    "create_empty_quantized_tensor",
    "dequantize",
    "is_delayed",
    "is_mxfp8",
    "layout_of",
    "multi_tensor_quantize",
    "quantize",
    "quantize_as",
    "split_quantize",
]

SOURCE = "pytorch/csrc/extensions/cast.cpp"


def layout_of(quantizer: Any, caller: str) -> Layout:
    """The storage layout of a quantizer, recognised by its exact type as in C++.

    Raises:
        RuntimeError: not a quantizer that the C++ knows.
    """
    classes = te_classes()
    kind = type(quantizer)
    if kind is classes.delayed_quantizer:
        return DELAYED
    if kind is classes.tensorwise_quantizer:
        return CURRENT
    if kind is classes.mxfp8_quantizer:
        return MXFP8
    if kind is classes.blockwise_quantizer:
        return BLOCKWISE
    if kind is classes.nvfp4_quantizer:
        return NVFP4
    return nvte_error("pytorch/csrc/common.cpp", f"Unexpected type for quantizer: {kind.__name__}")


def is_delayed(quantizer: Any) -> bool:
    """Whether kernels write FP8 directly from their fp32 result for this quantizer."""
    return type(quantizer) is te_classes().delayed_quantizer


def is_mxfp8(quantizer: Any) -> bool:
    """Whether kernels that compute a tensor quantise it in blocks of MXFP8 too."""
    return type(quantizer) is te_classes().mxfp8_quantizer


def quantize_as(
    x: Tensor,
    quantizer: Any,
    dtype: torch.dtype,
    *,
    caller: str,
    output: Any = None,
    noop: Tensor | None = None,
    unrounded: Tensor | None = None,
) -> Any:
    """Quantise x into a new tensor of nominal dtype `dtype`, or in place into `output`.

    Args:
        x: what the kernel casts: the tensor itself, or the fp32 result of a fused kernel.
        quantizer: TE quantizer.
        dtype: dtype that the quantised tensor stands for.
        caller: binding function at work, for records and errors.
        output: tensor to write into.
        noop: fp32 flag; where it is 1 nothing is written.
        unrounded: x before the kernel rounded it, fp32, where the kernel took the amax of that as well: it
            takes the place of x's own.
    """
    layout = layout_of(quantizer, caller)
    require_high_precision(x)
    x = x.detach().contiguous()
    if output is not None:
        shape = adapt(layout, quantizer, output)
        nvte_check(
            tuple(shape) == tuple(x.shape),
            "common/cast/core/common.cuh",
            f"Input and output shapes need to match (got {tuple(x.shape)} and {tuple(shape)}).",
        )
    skip = x.numel() == 0 or (noop is not None and noop.reshape(-1)[0].item() == 1.0)
    if skip:
        if output is not None:
            return output
        return layout.wrap(
            quantizer, allocate(layout, quantizer, x.shape, x.device), x.shape, dtype, x.device
        )
    if observers():
        _record(x, quantizer, caller)
    buffers = _encode(layout, quantizer, x, unrounded)
    if output is None:
        return layout.wrap(quantizer, buffers, x.shape, dtype, x.device)
    store(layout, quantizer, buffers, output)
    return output


def _encode(layout: Layout, quantizer: Any, x: Tensor, unrounded: Tensor | None) -> Buffers:
    if unrounded is not None:
        if layout is CURRENT:
            return CURRENT.encode_knowing(quantizer, x, amax_of(unrounded))
        if layout is NVFP4 and fuses_amax(quantizer):
            return NVFP4.encode_knowing(quantizer, x, amax_of(unrounded))
    return layout.encode(quantizer, x)


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    result = quantize_as(tensor, quantizer, tensor.dtype, caller="quantize", output=output, noop=noop)
    if release().swizzles_after_quantizing and quantizer.optimize_for_gemm:
        # Where the kernel does not write them so itself, TE brings the scales into the GEMM's order now.
        swizzle_scales_for_gemm_(result)
    return result


def create_empty_quantized_tensor(
    quantizer: Any,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str,
    pin_memory: bool,
) -> Any:
    layout = layout_of(quantizer, "create_empty_quantized_tensor")
    place = torch.device(device)
    return layout.wrap(quantizer, allocate(layout, quantizer, shape, place), shape, dtype, place)


def dequantize(input: Any, otype: Any) -> Tensor:
    """High-precision values; rowwise data where the tensor has it."""
    classes = te_classes()
    dtype = torch_dtype(otype)
    if isinstance(input, classes.float8_storage):
        nvte_check(
            input._data is not None, "common/common.h", "Cannot dequantize tensor without rowwise data."
        )
        shape = input._data.shape
        columnwise = False
    elif isinstance(input, classes.mxfp8_storage):
        if sm_arch() < 100:
            nvte_error(
                "common/cast/dispatch/dequantize.cuh",
                "MXFP8 Dequantization is NOT supported by architectures < 10.0",
            )
        columnwise = input._rowwise_data is None
        shape = MXFP8.shape_of(input)
    elif isinstance(input, classes.blockwise_storage):
        nvte_error(
            "common/cast/dispatch/dequantize.cuh", f"Not implemented scaling mode: {scaling_mode(input)}."
        )
    elif isinstance(input, classes.nvfp4_storage):
        columnwise = False
        shape = NVFP4.shape_of(input)
        nvte_check(input._rowwise_data is not None, "common/common.h", "Input must have FP4 type.")
    elif isinstance(input, classes.quantized_storage):
        not_emulated(f"dequantize of {type(input).__name__}")
    else:
        nvte_error("common/cast/dispatch/dequantize.cuh", "Input must have FP8 type.")
    if 0 in shape:
        return torch.empty(shape, dtype=dtype, device=input.device)
    return operands.values(input, columnwise=columnwise).reshape(shape).to(dtype)


def bgrad_quantize(input: Tensor, quantizer: Any) -> list[Any]:
    """Bias gradient (sum over all but the last dimension, accumulated in fp32) and the quantised gradient."""
    grad = input.detach().contiguous()
    bias_grad = grad.reshape(-1, grad.shape[-1]).sum(dim=0, dtype=torch.float32).to(grad.dtype)
    if quantizer is None:
        return [bias_grad, grad]
    return [bias_grad, quantize_as(grad, quantizer, grad.dtype, caller="bgrad_quantize")]


def multi_tensor_quantize(tensor_list: Sequence[Tensor], quantizer_list: Sequence[Any]) -> list[Any]:
    nvte_check(
        len(quantizer_list) == len(tensor_list),
        SOURCE,
        f"Expected {len(tensor_list)} quantizers, but got {len(quantizer_list)}",
    )
    for number, tensor in enumerate(tensor_list):
        nvte_check(tensor.is_contiguous(), SOURCE, f"Input tensor {number} is not contiguous")
    return [
        quantize_as(tensor, quantizer, tensor.dtype, caller="multi_tensor_quantize")
        for tensor, quantizer in zip(tensor_list, quantizer_list, strict=True)
    ]


def split_quantize(
    tensor: Tensor,
    split_sections: Sequence[int],
    quantizer_list: Sequence[Any],
    disable_bulk_allocation: bool = False,
) -> list[Any]:
    """Split along the first dimension and quantise every part with its own quantizer."""
    nvte_check(
        len(quantizer_list) == len(split_sections),
        SOURCE,
        f"Expected {len(split_sections)} quantizers, but got {len(quantizer_list)}",
    )
    sections = [int(section) for section in split_sections]
    if not sections:
        return []
    nvte_check(tensor.dim() > 0, SOURCE, "Input tensor has 0 dims")
    nvte_check(
        sum(sections) <= tensor.shape[0],
        SOURCE,
        f"Attempted to split tensor with shape={tuple(tensor.shape)} along dim 0 "
        f"with split_sections={sections}",
    )
    parts = torch.split(tensor[: sum(sections)], sections)
    return [
        quantize_as(part, quantizer, tensor.dtype, caller="split_quantize")
        for part, quantizer in zip(parts, quantizer_list, strict=True)
    ]


def compute_amax(input: Tensor, amax: Tensor) -> None:
    nvte_check(
        amax.dtype == torch.float32, "pytorch/csrc/extensions/recipe.cpp", "amax must be a float tensor"
    )
    nvte_check(amax.numel() == 1, "pytorch/csrc/extensions/recipe.cpp", "amax must have exactly one element")
    overwrite(amax, amax_of(input.detach()).reshape(amax.shape))


def _record(x: Tensor, quantizer: Any, caller: str) -> None:
    record = QuantizeRecord(
        quantizer=type(quantizer).__name__,
        format=element_format(quantizer.dtype),
        shape=tuple(x.shape),
        rowwise=bool(quantizer.rowwise_usage),
        columnwise=bool(quantizer.columnwise_usage),
        source=caller,
        force_pow_2_scales=getattr(quantizer, "force_pow_2_scales", None),
        amax_epsilon=getattr(quantizer, "amax_epsilon", None),
        block_scaling_dim=getattr(quantizer, "block_scaling_dim", None),
        with_2d_quantization=getattr(quantizer, "with_2d_quantization", None),
        with_rht=getattr(quantizer, "with_rht", None),
        stochastic_rounding=getattr(quantizer, "stochastic_rounding", None),
        with_amax_reduction=bool(getattr(quantizer, "with_amax_reduction", False)),
    )
    for observer in observers():
        observer.quantizations.append(record)
