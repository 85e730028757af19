"""What a quantised grouped tensor is turned into: its values, scales in the order of a GEMM, columnwise data.

Follows `group_dequantize` and `group_requantize_inplace` in `pytorch/csrc/extensions/cast.cpp`, and
`grouped_swizzle_for_gemm` in `pytorch/csrc/extensions/swizzle.cpp` of Transformer Engine.
"""

# signatures are pybind's
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.binding import operands
from nemo_fp8_recipes.emulation.binding.blockwise import BLOCKWISE
from nemo_fp8_recipes.emulation.binding.checks import nvte_check, nvte_error
from nemo_fp8_recipes.emulation.binding.dtypes import torch_dtype
from nemo_fp8_recipes.emulation.binding.grouped import group_quantize
from nemo_fp8_recipes.emulation.binding.grouped_layout import (
    ATTRIBUTES,
    Group,
    group_of,
    make_group,
    member,
    with_usage,
)
from nemo_fp8_recipes.emulation.binding.grouped_limits import check_dequantizable
from nemo_fp8_recipes.emulation.binding.mxfp8 import MXFP8, swizzle
from nemo_fp8_recipes.emulation.binding.releases import release
from nemo_fp8_recipes.emulation.binding.te_classes import te_classes

__all__ = ["group_dequantize", "group_requantize_inplace", "grouped_swizzle_for_gemm"]

SOURCE = "pytorch/csrc/extensions/cast.cpp"


def _members(grouped: Any) -> tuple[Any, Group]:
    """The quantizer, with the usages that the group has data of, and the members."""
    quantizer = with_usage(
        grouped.quantizer,
        rowwise=grouped.rowwise_data is not None,
        columnwise=grouped.columnwise_data is not None,
    )
    logical = (int(grouped.logical_shape[0]), int(grouped.logical_shape[1]))
    group = group_of(
        logical, grouped.num_tensors, grouped.first_dims, grouped.last_dims, grouped.tensor_offsets
    )
    return quantizer, group


def group_dequantize(input: Any, otype: Any) -> Any:
    """High-precision grouped tensor, of a group that has data of one direction."""
    dtype = torch_dtype(otype)
    quantizer, group = _members(input)
    if math.prod(group.logical):
        check_dequantizable(input, group)
    layout = BLOCKWISE if type(input.quantizer) is te_classes().blockwise_quantizer else MXFP8
    out = torch.empty(math.prod(group.logical), dtype=dtype)
    columnwise = input.rowwise_data is None
    for number, shape in enumerate(group.shapes):
        size = math.prod(shape)
        if not size:
            continue
        buffers = member(layout, quantizer, group, number, input)
        alone = layout.wrap(quantizer, buffers, shape, dtype, out.device)
        release().set_fields(alone, with_gemm_swizzled_scales=False)
        values = operands.values(alone, columnwise=columnwise)
        out[group.starts[number] : group.starts[number] + size].view(shape).copy_(values)
    made: dict[str, Tensor | None] = {"rowwise_data": out, "columnwise_data": torch.empty_like(out)}
    return make_group(None, made, group, dtype)


def grouped_swizzle_for_gemm(tensor: Any, rowwise: bool, columnwise: bool) -> None:
    """Replace the scales of an MXFP8 group by those in the GEMM's order. Those of the direction that is not
    asked for are dropped, as in C++.
    """
    quantizer, group = _members(tensor)
    if type(tensor.quantizer) is not te_classes().mxfp8_quantizer or tensor._with_gemm_swizzled_scales:
        return
    done: dict[str, Tensor | None] = {}
    for name, wanted, along in (
        ("_rowwise_scale_inv", rowwise, False),
        ("_columnwise_scale_inv", columnwise, True),
    ):
        scales = getattr(tensor, ATTRIBUTES[name])
        done[ATTRIBUTES[name]] = None
        if not wanted or scales is None or scales.numel() == 0:
            continue
        swizzled = torch.zeros_like(scales)
        for number, shape in enumerate(group.shapes):
            if math.prod(shape):
                source = member(MXFP8, quantizer, group, number, tensor)[name]
                target = member(MXFP8, quantizer, group, number, _only(tensor, ATTRIBUTES[name], swizzled))
                target[name].copy_(swizzle(source, columnwise=along))
        if group.uniform:
            # One tile row of the GEMM's operand after the other.
            scale_rows, scale_columns = MXFP8.specs(quantizer, group.shapes[0])[name][0]
            tiles = scale_columns if along else scale_rows
            swizzled = swizzled[: len(group.shapes) * scale_rows * scale_columns].view(
                len(group.shapes) * tiles, -1
            )
        done[ATTRIBUTES[name]] = swizzled
    if any(scales is not None for scales in done.values()):
        for attribute, scales in done.items():
            setattr(tensor, attribute, scales)
        tensor._with_gemm_swizzled_scales = True


def _only(tensor: Any, attribute: str, buffer: Tensor) -> dict[str, Tensor]:
    """The flat buffers of a group, with another one in the place of one of them."""
    buffers = {name: getattr(tensor, name) for name in set(ATTRIBUTES.values())}
    return {**buffers, attribute: buffer}


def group_requantize_inplace(
    grouped_x: Any,
    quantizer: Any,
    num_tensors: int,
    first_dims: Tensor | None,
    otype: Any,
    tensor_offsets: Tensor | None = None,
    return_dequantized: bool = False,
) -> Tensor | None:
    """Make an MXFP8 group that has rowwise data ready for GEMMs: columnwise data from the dequantised values,
    and all scales in the GEMM's order.
    """
    has_rowwise = grouped_x.rowwise_data is not None and grouped_x.scale_inv is not None
    has_columnwise = grouped_x.columnwise_data is not None and grouped_x.columnwise_scale_inv is not None
    nvte_check(has_rowwise, SOURCE, "Grouped input has no rowwise data and scales for the GEMM to consume.")
    own = grouped_x.quantizer
    nvte_check(own is not None, SOURCE, "Grouped input has no quantizer.")
    nvte_check(
        type(own) is type(quantizer), SOURCE, "Grouped input and the op disagree on quantization format."
    )
    nvte_check(
        int(own.dtype) == int(quantizer.dtype),
        SOURCE,
        "Grouped input and the quantizer disagree on the FP8 dtype.",
    )
    need_columnwise = bool(quantizer.columnwise_usage)
    if grouped_x._with_gemm_swizzled_scales:
        nvte_check(
            has_columnwise or not need_columnwise,
            SOURCE,
            "Grouped input has swizzled scales but no columnwise data for the wgrad GEMM. It cannot be "
            "rebuilt, because dequantization requires scales in compact format.",
        )
        nvte_check(
            not return_dequantized,
            SOURCE,
            "Cannot return a dequantized tensor for an already-swizzled grouped input: "
            "dequantization requires scales in compact format.",
        )
        return None
    if has_columnwise:
        nvte_error(
            SOURCE,
            "Grouped input already has columnwise data but unswizzled scales; requantizing from it is not "
            "supported.",
        )
    nvte_check(
        type(quantizer) is te_classes().mxfp8_quantizer,
        SOURCE,
        "Requantizing a grouped input is only supported for MXFP8.",
    )
    rows, columns = (int(size) for size in grouped_x.logical_shape)
    nvte_check(
        rows % 128 == 0 and columns % 128 == 0,
        SOURCE,
        f"Requantizing a grouped input requires dims that are multiples of 128, but got ({rows}, {columns}).",
    )
    dequantized = None
    if need_columnwise or return_dequantized:
        dequantized = group_dequantize(grouped_x, otype).rowwise_data.view(rows, columns)
    grouped_swizzle_for_gemm(grouped_x, rowwise=True, columnwise=False)
    grouped_x.scale_inv = grouped_x.scale_inv.reshape(-1)
    if need_columnwise and dequantized is not None:
        only = with_usage(quantizer, rowwise=False, columnwise=True)
        turned = group_quantize(dequantized, only, num_tensors, first_dims, tensor_offsets=tensor_offsets)
        grouped_x.columnwise_data = turned.columnwise_data
        grouped_x.columnwise_scale_inv = turned.columnwise_scale_inv
    return dequantized if return_dequantized else None
