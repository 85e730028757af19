"""Quantising the matrices of all experts at once, into a grouped tensor.

Follows `group_quantize` and `bgrad_group_quantize` in `pytorch/csrc/extensions/cast.cpp` of Transformer
Engine. A member of the group is quantised as it would be alone.
"""

# signatures are pybind's
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.binding.checks import nvte_check, nvte_error
from nemo_fp8_recipes.emulation.binding.dtypes import fp8_format, require_high_precision
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
from nemo_fp8_recipes.emulation.binding.grouped_limits import check_quantizable
from nemo_fp8_recipes.emulation.binding.mxfp8 import MXFP8, swizzle
from nemo_fp8_recipes.emulation.binding.nvfp4 import NVFP4
from nemo_fp8_recipes.emulation.binding.per_tensor import CURRENT, amax_of
from nemo_fp8_recipes.emulation.binding.releases import release
from nemo_fp8_recipes.emulation.binding.storage import Layout
from nemo_fp8_recipes.emulation.binding.te_classes import te_classes
from nemo_fp8_recipes.numerics.scale import reciprocal, scale_from_amax

__all__ = [
    "bgrad_group_quantize",
    "group_quantize",
    "nvfp4_group_quantize_with_amax",
    "nvfp4_quantize_with_amax",
]

SOURCE = "pytorch/csrc/extensions/cast.cpp"
_FORMATS = {
    False: "only support NVFP4 or MXFP8 quantizer.",
    True: "only supports MXFP8, NVFP4, Float8CurrentScalingQuantizer, or Float8Blockwise quantizer.",
}
"""What is said of other quantizers, by `groups_of_every_format`."""


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
    layout = layout_of_group(quantizer)
    if layout is None:
        nvte_error(SOURCE, f"group_quantize: {_FORMATS[release().groups_of_every_format]}")
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
    swizzled = layout in (MXFP8, NVFP4) and bool(quantizer.optimize_for_gemm)
    if output is None:
        buffers = {**allocate_group(layout, quantizer, group), **(amaxes or {})}
        output = make_group(quantizer, dict(buffers), group, tensor.dtype, **_tags(quantizer, swizzled))
    else:
        _check_output(output, group, num_tensors, quantizer)
    skip = noop_flag is not None and noop_flag.reshape(-1)[0].item() == 1.0
    if tensor.numel() == 0:
        return output
    nvte_check(
        tensor.is_contiguous(),
        SOURCE,
        f"{caller}: the tensor has to be contiguous, and its strides are {tensor.stride()}: the kernels read "
        "what lies behind its address. Pass tensor.contiguous().",
    )
    check_quantizable(layout, quantizer, group, tensor)
    if skip:
        return output
    flat = tensor.detach().view(-1)
    parts = [
        flat[start : start + math.prod(shape)].view(shape)
        for start, shape in zip(group.starts, group.shapes, strict=True)
    ]
    if layout is CURRENT:
        _scale_per_tensor(parts, quantizer, output)
    for number, part in enumerate(parts):
        if not part.numel():
            continue
        if layout is CURRENT:
            _cast_per_tensor(part, quantizer, group, number, output)
        else:
            _quantize_member(part, layout, quantizer, group, number, output, amaxes, swizzled)
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
        "group_quantize: output has an incompatible logical shape.",
    )
    nvte_check(output.quantizer is not None, SOURCE, "group_quantize: output must have quantized storage.")
    nvte_check(
        output.quantizer is quantizer,
        SOURCE,
        "group_quantize: output must have been created by the same quantizer.",
    )


def _quantize_member(
    x: Tensor,
    layout: Layout,
    quantizer: Any,
    group: Group,
    number: int,
    output: Any,
    amaxes: dict[str, Tensor] | None,
    swizzled: bool,
) -> None:
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
        whole = encoded[name]
        buffer.copy_(whole.view(buffer.shape) if whole.numel() == buffer.numel() else whole[: len(buffer)])


def _scale_per_tensor(parts: Sequence[Tensor], quantizer: Any, output: Any) -> None:
    """Amax, scale and inverse scale of every member, of empty ones too; amaxes are reduced in one go."""
    largest = torch.stack([amax_of(part) if part.numel() else torch.zeros(()) for part in parts])
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
    output.amax.copy_(largest)
    output.scale.copy_(scale)
    for inverse in (output.scale_inv, output.columnwise_scale_inv):
        if inverse is not None:
            inverse.copy_(reciprocal(scale))


def _cast_per_tensor(x: Tensor, quantizer: Any, group: Group, number: int, output: Any) -> None:
    both = with_usage(quantizer, rowwise=True, columnwise=output.columnwise_data is not None)
    encoded, _ = CURRENT._cast(both, x, output.scale[number : number + 1], observe=False)
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
    nvte_check(tensor.dim() == 2, SOURCE, "Tensor must be 2D")
    nvte_check(
        last_dims is None,
        SOURCE,
        "bgrad_group_quantize: varying last dim is not supported because the underlying MXFP8 dbias kernel "
        "requires a constant last dimension across grouped tensors.",
    )
    nvte_check(
        tensor.numel() > 0 or release().name != "2.14",
        SOURCE,
        "bgrad_group_quantize: empty input tensor is not supported.",
    )
    known, says = [classes.mxfp8_quantizer], "only MXFP8 quantizer is supported."
    if release().groups_of_every_format:
        known.append(classes.blockwise_quantizer)
        says = "only MXFP8 and FP8 block-scaling quantizers are supported."
    nvte_check(type(quantizer) in known, SOURCE, f"bgrad_group_quantize: {says}")
    grouped = _quantize_group(
        tensor, quantizer, num_tensors, first_dims, None, tensor_offsets, caller="bgrad_group_quantize"
    )
    group = group_of(tuple(tensor.shape), num_tensors, first_dims, None, tensor_offsets)
    flat = tensor.detach().reshape(-1)
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
