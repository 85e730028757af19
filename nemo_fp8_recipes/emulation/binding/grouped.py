"""Quantising the matrices of all experts at once, into a grouped tensor.

Follows `group_quantize`, `bgrad_group_quantize`, `group_dequantize` and `group_requantize_inplace` in
`pytorch/csrc/extensions/cast.cpp`, and `grouped_swizzle_for_gemm` in `pytorch/csrc/extensions/swizzle.cpp` of
Transformer Engine. A member of the group is quantised as it would be alone.
"""

# signatures are pybind's
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.binding import operands
from nemo_fp8_recipes.emulation.binding.checks import nvte_check, nvte_error
from nemo_fp8_recipes.emulation.binding.dtypes import fp8_format, require_high_precision, torch_dtype
from nemo_fp8_recipes.emulation.binding.grouped_layout import (
    ATTRIBUTES,
    Group,
    allocate_group,
    group_of,
    layout_of_group,
    make_group,
    member,
    with_usage,
)
from nemo_fp8_recipes.emulation.binding.mxfp8 import MXFP8, swizzle
from nemo_fp8_recipes.emulation.binding.nvfp4 import NVFP4
from nemo_fp8_recipes.emulation.binding.per_tensor import CURRENT, amax_of
from nemo_fp8_recipes.emulation.binding.releases import release
from nemo_fp8_recipes.emulation.binding.te_classes import te_classes
from nemo_fp8_recipes.numerics.scale import reciprocal, scale_from_amax

__all__ = [
    "bgrad_group_quantize",
    "group_dequantize",
    "group_quantize",
    "group_requantize_inplace",
    "grouped_swizzle_for_gemm",
    "nvfp4_group_quantize_with_amax",
    "nvfp4_quantize_with_amax",
]

SOURCE = "pytorch/csrc/extensions/cast.cpp"


def group_quantize(*args: Any, **kwargs: Any) -> Any:
    """A grouped tensor of [rows, columns], of which each member has so many rows.

    Arguments: tensor, quantizer, num_tensors, first_dims; since 2.17 tensor_offsets; since 2.20 last_dims
    before it, noop_flag and output after it.
    """
    return _BY_RELEASE[release().name](_quantize_group, *args, **kwargs)


def bgrad_group_quantize(*args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
    """The grouped tensor, and the sum of every member's rows [members, columns].

    Arguments: those of `group_quantize` up to tensor_offsets.
    """
    grouped: tuple[Any, Tensor] = _BY_RELEASE[release().name](_quantize_group_with_bias, *args, **kwargs)
    return grouped


def _as_2_14(
    make: Callable[..., Any], tensor: Tensor, quantizer: Any, num_tensors: int, first_dims: Tensor | None
) -> Any:
    return make(tensor, quantizer, num_tensors, first_dims)


def _as_2_17(
    make: Callable[..., Any],
    tensor: Tensor,
    quantizer: Any,
    num_tensors: int,
    first_dims: Tensor | None,
    tensor_offsets: Tensor | None = None,
) -> Any:
    return make(tensor, quantizer, num_tensors, first_dims, None, tensor_offsets)


def _as_2_20(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return make(*args, **kwargs)


_BY_RELEASE: dict[str, Callable[..., Any]] = {"2.14": _as_2_14, "2.17": _as_2_17, "2.20": _as_2_20}


def _quantize_group(
    tensor: Tensor,
    quantizer: Any,
    num_tensors: int,
    first_dims: Tensor | None,
    last_dims: Tensor | None = None,
    tensor_offsets: Tensor | None = None,
    noop_flag: Tensor | None = None,
    output: Any = None,
    *,
    amaxes: dict[str, Tensor] | None = None,
    caller: str = "group_quantize",
) -> Any:
    nvte_check(tensor.dim() == 2, SOURCE, "Tensor must be 2D")
    require_high_precision(tensor)
    layout = layout_of_group(quantizer, caller)
    nvte_check(
        layout is not NVFP4 or last_dims is None,
        SOURCE,
        f"{caller}: varying last dim is not supported with NVFP4.",
    )
    nvte_check(
        layout is not CURRENT or first_dims is None or last_dims is None,
        SOURCE,
        "FP8 current-scaling grouped quantization does not support varying both first and last dimensions.",
    )
    group = group_of(tuple(tensor.shape), num_tensors, first_dims, last_dims, tensor_offsets)
    if layout is NVFP4:
        _check_nvfp4(quantizer)
    swizzled = layout in (MXFP8, NVFP4) and bool(quantizer.optimize_for_gemm)
    if output is None:
        buffers = {**allocate_group(layout, quantizer, group), **(amaxes or {})}
        output = make_group(quantizer, dict(buffers), group, tensor.dtype, **_tags(quantizer, swizzled))
    else:
        _check_output(output, group, num_tensors, quantizer)
    skip = noop_flag is not None and noop_flag.reshape(-1)[0].item() == 1.0
    if tensor.numel() == 0 or skip:
        return output
    flat = tensor.detach().contiguous().view(-1)
    for number, shape in enumerate(group.shapes):
        size = math.prod(shape)
        if size:
            part = flat[group.starts[number] : group.starts[number] + size].view(shape)
            _quantize_member(part, quantizer, group, number, output, amaxes, swizzled)
    return output


def _tags(quantizer: Any, swizzled: bool) -> dict[str, Any]:
    option = release().option
    tags: dict[str, Any] = {"with_gemm_swizzled_scales": swizzled}
    if type(quantizer) is te_classes().nvfp4_quantizer:
        tags |= {
            "row_scaled_nvfp4": bool(option(quantizer, "row_scaled_nvfp4")),
            "nvfp4_use_4over6": bool(option(quantizer, "nvfp4_use_4over6")),
            "nvfp4_e4m3_max": int(option(quantizer, "nvfp4_e4m3_max")),
        }
    return tags


def _check_nvfp4(quantizer: Any) -> None:
    option = release().option
    nvte_check(not quantizer.with_2d_quantization, SOURCE, "2D scaling grouped quant kernel is not ready yet")
    nvte_check(
        not option(quantizer, "nvfp4_use_4over6"),
        SOURCE,
        "NVFP4 4over6 quantization is not supported for grouped quantization.",
    )
    nvte_check(
        bool(quantizer.with_rht), SOURCE, "graph safe grouped quant kernel for non-RHT path is not ready yet"
    )
    nvte_check(
        bool(quantizer.with_post_rht_amax),
        SOURCE,
        "grouped NVFP4 RHT quantization expects post-RHT amax buffers.",
    )


def _check_output(output: Any, group: Group, num_tensors: int, quantizer: Any) -> None:
    nvte_check(
        group.uniform and group.offsets is None,
        SOURCE,
        "group_quantize: output reuse currently requires uniform tensor shapes.",
    )
    nvte_check(
        output.num_tensors == num_tensors,
        SOURCE,
        "group_quantize: output has a different number of tensors.",
    )
    nvte_check(
        tuple(output.logical_shape) == group.logical,
        SOURCE,
        "group_quantize: output has a different logical shape.",
    )
    nvte_check(
        output.quantizer is quantizer,
        SOURCE,
        "group_quantize: output must have been created by the same quantizer.",
    )


def _quantize_member(
    x: Tensor,
    quantizer: Any,
    group: Group,
    number: int,
    output: Any,
    amaxes: dict[str, Tensor] | None,
    swizzled: bool,
) -> None:
    layout = layout_of_group(quantizer, "group_quantize")
    if layout is CURRENT:
        _quantize_current(x, quantizer, group, number, output)
        return
    given = None
    if amaxes is not None:
        given = {
            name: amaxes[ATTRIBUTES[name]][number : number + 1]
            for name in ("_amax_rowwise", "_amax_columnwise")
            if ATTRIBUTES[name] in amaxes
        }
    encoded = layout.encode(quantizer, x) if given is None else NVFP4.encode_under(quantizer, x, given)
    if layout is NVFP4 and swizzled and not NVFP4.swizzled(quantizer, x.shape):
        for name in ("_rowwise_scale_inv", "_columnwise_scale_inv"):
            if name in encoded:
                encoded[name] = swizzle(encoded[name], columnwise=False)
    for name, buffer in member(layout, quantizer, group, number, output).items():
        buffer.copy_(encoded[name].view(buffer.shape))


def _quantize_current(x: Tensor, quantizer: Any, group: Group, number: int, output: Any) -> None:
    """Per-tensor scaling: amax, scale and inverse scale of each member in one array each."""
    largest = amax_of(x).reshape(1)
    if quantizer.with_amax_reduction:
        torch.distributed.all_reduce(
            largest,
            op=torch.distributed.ReduceOp.MAX,
            group=quantizer._canonicalized_amax_reduction_group(),
        )
    scale = scale_from_amax(
        largest,
        fp8_format(quantizer.dtype).max,
        epsilon=float(quantizer.amax_epsilon),
        power_of_two=bool(quantizer.force_pow_2_scales),
    )
    output.amax[number : number + 1].copy_(largest)
    output.scale[number : number + 1].copy_(scale)
    for inverse in (output.scale_inv, output.columnwise_scale_inv):
        if inverse is not None:
            inverse[number : number + 1].copy_(reciprocal(scale.reshape(1)))
    both = with_usage(quantizer, rowwise=True, columnwise=output.columnwise_data is not None)
    encoded, _ = CURRENT._cast(both, x, scale, observe=False)
    start, size = group.starts[number], x.numel()
    if output.rowwise_data is not None:
        output.rowwise_data[start : start + size].copy_(encoded["_data"].view(-1))
    if output.columnwise_data is not None:
        output.columnwise_data[start : start + size].copy_(encoded["_transpose"].view(-1))


def _quantize_group_with_bias(
    tensor: Tensor,
    quantizer: Any,
    num_tensors: int,
    first_dims: Tensor | None,
    last_dims: Tensor | None = None,
    tensor_offsets: Tensor | None = None,
) -> tuple[Any, Tensor]:
    classes = te_classes()
    known = [classes.mxfp8_quantizer]
    if release().groups_of_every_format:
        known.append(classes.blockwise_quantizer)
    nvte_check(last_dims is None, SOURCE, "bgrad_group_quantize: varying last dim is not supported.")
    nvte_check(
        type(quantizer) in known,
        SOURCE,
        "bgrad_group_quantize: only MXFP8 and FP8 block-scaling quantizers are supported.",
    )
    grouped = _quantize_group(
        tensor, quantizer, num_tensors, first_dims, None, tensor_offsets, caller="bgrad_group_quantize"
    )
    group = group_of(tuple(tensor.shape), num_tensors, first_dims, None, tensor_offsets)
    flat = tensor.detach().contiguous().view(-1)
    sums = [
        flat[start : start + math.prod(shape)].view(shape).sum(dim=0, dtype=torch.float32)
        for start, shape in zip(group.starts, group.shapes, strict=True)
    ]
    return grouped, torch.stack(sums).to(tensor.dtype)


def nvfp4_quantize_with_amax(
    tensor: Tensor, quantizer: Any, rowwise_amax: Tensor, columnwise_amax: Tensor
) -> Any:
    """Quantise under amaxes that are known; the tensor keeps them."""
    _check_amaxes(quantizer, rowwise_amax, columnwise_amax, 1, "nvfp4_quantize_with_amax")
    nvte_check(tensor.dim() >= 2, SOURCE, "Tensor must be at least 2D")
    x = tensor.detach().contiguous()
    given = {"_amax_rowwise": rowwise_amax, "_amax_columnwise": columnwise_amax}
    buffers = NVFP4.encode_under(quantizer, x, given)
    made = NVFP4.wrap(quantizer, buffers, x.shape, x.dtype, x.device)
    if release().swizzles_after_quantizing and quantizer.optimize_for_gemm:
        from nemo_fp8_recipes.emulation.binding.swizzle import swizzle_scales_for_gemm_

        swizzle_scales_for_gemm_(made)
    return made


def nvfp4_group_quantize_with_amax(
    tensor: Tensor,
    quantizer: Any,
    num_tensors: int,
    first_dims: Tensor | None,
    *rest: Any,
    **named: Any,
) -> Any:
    """The same for a group; one amax for each member. Since 2.20 `last_dims` comes before the amaxes."""
    names = ["rowwise_amax", "columnwise_amax", "tensor_offsets"]
    if release().groups_of_every_format:
        names.insert(0, "last_dims")
    given = {**dict(zip(names, rest, strict=False)), **named}
    rowwise, columnwise = given["rowwise_amax"], given["columnwise_amax"]
    caller = "nvfp4_group_quantize_with_amax"
    _check_amaxes(quantizer, rowwise, columnwise, num_tensors, caller)
    amaxes = {}
    if quantizer.rowwise_usage:
        amaxes["amax"] = rowwise
    if quantizer.columnwise_usage:
        amaxes["columnwise_amax"] = columnwise
    if quantizer.with_amax_reduction:
        for largest in amaxes.values():
            torch.distributed.all_reduce(
                largest,
                op=torch.distributed.ReduceOp.MAX,
                group=quantizer._canonicalized_amax_reduction_group(),
            )
    return _quantize_group(
        tensor,
        quantizer,
        num_tensors,
        first_dims,
        given.get("last_dims"),
        given.get("tensor_offsets"),
        amaxes=amaxes,
        caller=caller,
    )


def _check_amaxes(quantizer: Any, rowwise: Tensor, columnwise: Tensor, count: int, caller: str) -> None:
    nvte_check(
        type(quantizer) is te_classes().nvfp4_quantizer, SOURCE, f"{caller} only supports NVFP4 quantizers."
    )
    for name, amax in (("Rowwise", rowwise), ("Columnwise", columnwise)):
        nvte_check(amax.dtype == torch.float32, SOURCE, "Precomputed amax tensors must be float32.")
        nvte_check(amax.numel() == count, SOURCE, f"{name} amax must contain one value per group.")


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
    """High-precision grouped tensor; from rowwise data where there is some."""
    dtype = torch_dtype(otype)
    quantizer, group = _members(input)
    layout = layout_of_group(quantizer, "group_dequantize")
    nvte_check(
        layout is not NVFP4 and layout is not CURRENT,
        "common/cast/dispatch/dequantize.cuh",
        "Grouped dequantize not implemented for this scaling mode.",
    )
    nvte_check(
        not input._with_gemm_swizzled_scales,
        "common/cast/mxfp8/group_dequantize_mxfp8.cuh",
        "Input must have scales in compact format.",
    )
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
