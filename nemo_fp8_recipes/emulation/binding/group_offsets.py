"""Offsets of the members of a group, their addresses, and tensors in one buffer.

Follows `pytorch/csrc/extensions/misc.cpp`, `allocate.cpp`, `grouped_mlp_experimental.cpp` and, of release
2.14, `utils.cpp` of Transformer Engine. Addresses are those of host memory, where the emulated device has its
tensors.
"""

# ruff: noqa: ARG001  # devices are pybind's arguments
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.binding.checks import nvte_check, nvte_error
from nemo_fp8_recipes.emulation.binding.mxfp8 import swizzle

__all__ = [
    "bulk_allocate",
    "convert_host_pointers_to_tensor",
    "copy_data_ptrs_to_device",
    "get_device_pointer_for_data_and_scales",
    "splits_to_offsets",
    "splits_to_offsets_multi",
    "swizzle_scales_and_pack_ptrs_for_discrete_weights",
]

MISC = "pytorch/csrc/extensions/misc.cpp"
ALLOCATE = "pytorch/csrc/extensions/allocate.cpp"
EXPERIMENTAL = "pytorch/csrc/extensions/grouped_mlp_experimental.cpp"
UTILS = "pytorch/csrc/extensions/utils.cpp"
_ALIGNMENT = 16
_FP4 = 10
_QUANTIZED = (7, 8, _FP4)


def splits_to_offsets(first_dims: Tensor, logical_last_dim: int) -> Tensor:
    """int64 [members + 1]: where each begins, in elements."""
    nvte_check(first_dims.dtype == torch.int64, MISC, "first_dims must have dtype int64.")
    nvte_check(first_dims.dim() == 1, MISC, "first_dims must be a 1D tensor.")
    nvte_check(logical_last_dim > 0, MISC, "logical_last_dim must be greater than 0.")
    return torch.cat((first_dims.new_zeros(1), first_dims.cumsum(0))) * logical_last_dim


def splits_to_offsets_multi(
    split_sizes: Tensor,
    device: torch.device | str,
    *,
    strides: Sequence[int],
    include_leading_zero: Sequence[bool],
    dtypes: Sequence[torch.dtype],
    bulk_allocate: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """The sizes as int64, and their running sums times each stride."""
    nvte_check(
        len(strides) == len(include_leading_zero) == len(dtypes),
        MISC,
        "strides, include_leading_zero, and dtypes must have matching lengths, but got "
        f"{len(strides)}, {len(include_leading_zero)}, and {len(dtypes)}.",
    )
    sizes = split_sizes.as_subclass(Tensor).to(torch.int64)  # whatever a caller says of its device
    sums = torch.cat((sizes.new_zeros(1), sizes.cumsum(0)))
    offsets = [
        ((sums if leading else sums[1:]) * stride).to(dtype)
        for stride, leading, dtype in zip(strides, include_leading_zero, dtypes, strict=True)
    ]
    if not bulk_allocate:
        return sizes, offsets
    shared = _allocate([tuple(each.shape) for each in offsets], dtypes, [_ALIGNMENT] * len(offsets))
    for target, values in zip(shared, offsets, strict=True):
        target.copy_(values)
    return sizes, shared


def bulk_allocate(
    shapes: Sequence[Sequence[int]],
    dtypes: Sequence[torch.dtype],
    device: torch.device | str | None = None,
    alignments: Sequence[int] | None = None,
) -> list[Tensor]:
    """Tensors with no defined content, in one buffer."""
    nvte_check(len(dtypes) == len(shapes), ALLOCATE, f"Got {len(shapes)} shapes and {len(dtypes)} dtypes.")
    if alignments is None:
        alignments = [dtype.itemsize for dtype in dtypes]
    nvte_check(
        len(alignments) == len(shapes),
        ALLOCATE,
        f"Got {len(shapes)} shapes and {len(alignments)} alignments.",
    )
    return _allocate(shapes, dtypes, alignments)


def _allocate(
    shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype], alignments: Sequence[int]
) -> list[Tensor]:
    if not shapes:
        return []
    offsets, size = [], 0
    for shape, dtype, alignment in zip(shapes, dtypes, alignments, strict=True):
        start = -(-size // alignment) * alignment
        offsets.append(start)
        size = start + math.prod(shape) * dtype.itemsize
    most = max(*alignments, 1)
    buffer = torch.empty(size + most, dtype=torch.uint8)
    first = -buffer.data_ptr() % most
    made = []
    for shape, dtype, offset in zip(shapes, dtypes, offsets, strict=True):
        length = math.prod(shape) * dtype.itemsize
        part = buffer[first + offset : first + offset + length]
        made.append(part.view(dtype).view(tuple(shape)) if length else torch.empty(tuple(shape), dtype=dtype))
    return made


def copy_data_ptrs_to_device(tensors: Sequence[Tensor], device: torch.device | str) -> Tensor:
    """int64: the address of each tensor."""
    return _addresses([tensor.data_ptr() for tensor in tensors])


def _addresses(addresses: Sequence[int]) -> Tensor:
    return torch.tensor(addresses, dtype=torch.uint64).view(torch.int64)


def swizzle_scales_and_pack_ptrs_for_discrete_weights(
    data_tensors: Sequence[Tensor],
    scale_tensors: Sequence[Tensor],
    swizzle_type_str: str,
    device: torch.device | str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Addresses of the data, addresses of the scales in the GEMM's order, and the buffer of these, uint8.

    All scales have one shape; each begins at a multiple of 16 bytes.
    """
    nvte_check(
        len(data_tensors) == len(scale_tensors),
        EXPERIMENTAL,
        "Expected data_tensors and scale_tensors to have matching sizes, but got "
        f"{len(data_tensors)} and {len(scale_tensors)}.",
    )
    if swizzle_type_str not in ("mxfp8_rowwise", "mxfp8_columnwise", "nvfp4"):
        nvte_error(
            EXPERIMENTAL,
            f"Unsupported swizzle type ({swizzle_type_str}). "
            "Expected one of: mxfp8_rowwise, mxfp8_columnwise, nvfp4.",
        )
    if not data_tensors:
        nothing = torch.empty(0, dtype=torch.int64)
        return nothing, nothing.clone(), torch.empty(0, dtype=torch.uint8)
    nvte_check(
        scale_tensors[0].dim() == 2,
        EXPERIMENTAL,
        f"Expected 2D scale tensor, but got shape={tuple(scale_tensors[0].shape)}.",
    )
    columnwise = swizzle_type_str == "mxfp8_columnwise"
    starts, buffer = _ordered_scales(
        scale_tensors,
        _scales_of(data_tensors[0], fp4=swizzle_type_str == "nvfp4", columnwise=columnwise),
        columnwise=columnwise,
    )
    return _addresses([data.data_ptr() for data in data_tensors]), _addresses(starts), buffer


def _scales_of(data: Tensor, *, fp4: bool, columnwise: bool) -> tuple[int, int]:
    """How many scales the codes of a matrix have, without padding."""
    rows, columns = math.prod(data.shape[:-1]), data.shape[-1]
    if fp4:
        return rows, columns // 8  # two codes a byte, 16 a scale
    return (rows // 32, columns) if columnwise else (rows, columns // 32)


def _ordered_scales(
    scale_tensors: Sequence[Tensor], without_padding: tuple[int, int], *, columnwise: bool
) -> tuple[list[int], Tensor]:
    """Addresses of the scales in the GEMM's order, and the buffer that they are in. Their padding is zero,
    whatever that of the given ones is.
    """
    length = scale_tensors[0].numel()
    stride = -(-length // _ALIGNMENT) * _ALIGNMENT
    buffer = torch.empty(stride * len(scale_tensors), dtype=torch.uint8)
    rows, columns = without_padding
    for number, scales in enumerate(scale_tensors):
        clean = scales.detach().view(torch.uint8).clone()
        clean[rows:] = 0
        clean[:, columns:] = 0
        ordered = swizzle(clean, columnwise=columnwise)
        buffer[number * stride : number * stride + length].copy_(ordered.reshape(-1))
    return [buffer.data_ptr() + number * stride for number in range(len(scale_tensors))], buffer


def convert_host_pointers_to_tensor(tensor_lists: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """int64, one tensor a list: the address of each of its tensors."""
    for tensors in tensor_lists:
        nvte_check(len(tensors) > 0, UTILS, "Tensor list is empty.")
    return [_addresses([tensor.data_ptr() for tensor in tensors]) for tensors in tensor_lists]


def get_device_pointer_for_data_and_scales(
    data_tensors: Sequence[Tensor],
    scale_tensors: Sequence[Tensor],
    swizzle: bool = False,
    *,
    rowwise: bool,
    data_dtype: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Addresses of the data and of the scales, these in the GEMM's order where that is asked for, and then
    the buffer that they are in; an empty tensor otherwise.
    """
    nvte_check(len(data_tensors) > 0, UTILS, "data_tensors must not be empty.")
    nvte_check(
        len(data_tensors) == len(scale_tensors),
        UTILS,
        "data_tensors and scale_tensors must have the same size.",
    )
    nvte_check(
        data_tensors[0].dim() == 2,
        UTILS,
        f"data_tensors elements must be 2D, got dim={data_tensors[0].dim()}",
    )
    addresses = _addresses([data.data_ptr() for data in data_tensors])
    if not swizzle:
        return (
            addresses,
            _addresses([scales.data_ptr() for scales in scale_tensors]),
            torch.empty(0, dtype=torch.uint8),
        )
    if int(data_dtype) not in _QUANTIZED:
        nvte_error(UTILS, "data_dtype must be an FP8 or FP4 type for swizzling.")
    fp4 = int(data_dtype) == _FP4
    shape = _scales_of(data_tensors[0], fp4=fp4, columnwise=not rowwise and not fp4)
    starts, buffer = _ordered_scales(scale_tensors, shape, columnwise=not rowwise and not fp4)
    return addresses, _addresses(starts), buffer
