"""Grouped tensors: the matrices of all experts, one behind the other in flat buffers.

Follows `create_grouped_tensor` of the quantizers in `pytorch/csrc/quantizer.cpp` of Transformer Engine. Every
member lies in the buffers as it would alone: data, and scales in the padded shape of that member. What lies
behind the last member is not written.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.binding.blockwise import BLOCKWISE
from nemo_fp8_recipes.emulation.binding.checks import nvte_check
from nemo_fp8_recipes.emulation.binding.mxfp8 import MXFP8
from nemo_fp8_recipes.emulation.binding.nvfp4 import NVFP4
from nemo_fp8_recipes.emulation.binding.per_tensor import CURRENT
from nemo_fp8_recipes.emulation.binding.releases import release
from nemo_fp8_recipes.emulation.binding.storage import SOURCE, Layout
from nemo_fp8_recipes.emulation.binding.te_classes import te_classes

__all__ = [
    "ARGUMENTS",
    "ATTRIBUTES",
    "Group",
    "allocate_group",
    "group_of",
    "layout_of_group",
    "make_group",
    "member",
    "with_usage",
]

ATTRIBUTES: dict[str, str] = {
    "_rowwise_data": "rowwise_data",
    "_rowwise_scale_inv": "scale_inv",
    "_columnwise_data": "columnwise_data",
    "_columnwise_scale_inv": "columnwise_scale_inv",
    "_amax_rowwise": "amax",
    "_amax_columnwise": "columnwise_amax",
    "_data": "rowwise_data",
    "_transpose": "columnwise_data",
}
"""Buffer of a single tensor -> attribute of a grouped one."""

ARGUMENTS = ("columnwise_data", "scale_inv", "columnwise_scale_inv", "amax", "columnwise_amax", "scale")


@dataclass(frozen=True)
class Group:
    """The members of a grouped tensor.

    Attributes:
        logical: shape of all of them stacked.
        shapes: shape of each.
        starts: first element of each, in a flat buffer of all.
        first_dims, last_dims, offsets: int64 tensors that say the same, where members differ.
    """

    logical: tuple[int, int]
    shapes: tuple[tuple[int, int], ...]
    starts: tuple[int, ...]
    first_dims: Tensor | None
    last_dims: Tensor | None
    offsets: Tensor | None

    @property
    def uniform(self) -> bool:
        return self.first_dims is None and self.last_dims is None


def group_of(
    logical: Sequence[int],
    num_tensors: int,
    first_dims: Tensor | None,
    last_dims: Tensor | None,
    tensor_offsets: Tensor | None,
) -> Group:
    """Read the shapes of the members.

    Raises:
        RuntimeError: metadata of another dtype or length, in TE's words; members beyond the tensor.
    """
    for name, metadata, length in (
        ("first_dims", first_dims, num_tensors),
        ("last_dims", last_dims, num_tensors),
        ("tensor_offsets", tensor_offsets, num_tensors + 1),
    ):
        if metadata is not None:
            nvte_check(metadata.dtype == torch.int64, SOURCE, f"{name} must have dtype int64.")
            nvte_check(metadata.numel() == length, SOURCE, f"{name} must have length {length}.")
    nvte_check(num_tensors > 0, "common/transformer_engine.cpp", "Number of tensors must be greater than 0")
    rows, columns = logical
    common = rows if last_dims is not None else rows // num_tensors
    firsts = [common] * num_tensors if first_dims is None else [int(n) for n in first_dims.tolist()]
    lasts = [columns] * num_tensors if last_dims is None else [int(n) for n in last_dims.tolist()]
    shapes = tuple(zip(firsts, lasts, strict=True))
    offsets = tensor_offsets
    if offsets is None and (first_dims is not None or last_dims is not None):
        sizes = torch.tensor([0, *(math.prod(shape) for shape in shapes)], dtype=torch.int64)
        offsets = sizes.cumsum(0)
    if offsets is None:
        starts = tuple(number * math.prod(shapes[0]) for number in range(num_tensors))
    else:
        starts = tuple(int(start) for start in offsets.tolist()[:-1])
    # On a GPU the kernels would go on behind the buffer.
    end = max(start + math.prod(shape) for start, shape in zip(starts, shapes, strict=True))
    nvte_check(
        end <= rows * columns,
        SOURCE,
        f"The members of the group end at element {end} of {rows * columns}; first_dims, last_dims and "
        "tensor_offsets have to fit the tensor.",
    )
    return Group((rows, columns), shapes, starts, first_dims, last_dims, offsets)


def layout_of_group(quantizer: Any) -> Layout | None:
    """The layout of the members; None of a quantizer that this release makes no groups with."""
    classes = te_classes()
    layouts: dict[type, Layout] = {classes.mxfp8_quantizer: MXFP8, classes.nvfp4_quantizer: NVFP4}
    if release().groups_of_every_format:
        layouts |= {classes.tensorwise_quantizer: CURRENT, classes.blockwise_quantizer: BLOCKWISE}
    return layouts.get(type(quantizer))


def with_usage(quantizer: Any, *, rowwise: bool, columnwise: bool) -> Any:
    """A copy of the quantizer that keeps these directions."""
    other = copy.copy(quantizer)
    other.rowwise_usage, other.columnwise_usage = rowwise, columnwise
    return other


def allocate_group(layout: Layout, quantizer: Any, group: Group) -> dict[str, Tensor]:
    """The flat buffers of a group, by attribute of the grouped tensor; their content is not defined."""
    count = len(group.shapes)
    rows, columns = group.logical
    buffers: dict[str, Tensor] = {}
    if layout is CURRENT:
        specs = CURRENT.specs(quantizer, group.logical)
        for name in ("_data", "_transpose"):
            if name in specs:
                buffers[ATTRIBUTES[name]] = torch.empty(rows * columns, dtype=torch.uint8)
        scale_inv = torch.empty(count)
        if "_data" in specs:
            buffers["scale_inv"] = scale_inv
        if "_transpose" in specs:
            buffers["columnwise_scale_inv"] = scale_inv
        return {**buffers, "amax": torch.empty(count), "scale": torch.empty(count)}
    square = layout is BLOCKWISE and quantizer.block_scaling_dim == 2
    both = layout is MXFP8 and group.first_dims is not None and group.last_dims is not None
    # Of members that differ in both, which are whole tiles, the logical shape is that of one row.
    logical = (32, max(rows * columns // 32, 32)) if both else group.logical
    for name, (shape, dtype) in layout.specs(quantizer, logical).items():
        size = count if name.startswith("_amax") else math.prod(shape)
        if both:
            size = rows * columns // (1 if name.endswith("_data") else 32)
        if square and name == "_columnwise_scale_inv":
            size += -(-columns // 128) * 4 * (count - 1)  # each member's rows are padded to 4
        # Zeros where the kernels write none: padding of scales.
        buffers[ATTRIBUTES[name]] = torch.zeros(size, dtype=dtype)
    return buffers


@cache
def _grouped_class(internal: bool) -> tuple[Any, frozenset[str]]:
    """TE's class, and the arguments that it takes in this release."""
    from transformer_engine.pytorch.tensor.grouped_tensor import GroupedTensor
    from transformer_engine.pytorch.tensor.storage.grouped_tensor_storage import GroupedTensorStorage

    made = GroupedTensorStorage if internal else GroupedTensor
    return made, frozenset(inspect.signature(made.__new__).parameters)


def make_group(
    quantizer: Any, buffers: dict[str, Tensor | None], group: Group, dtype: torch.dtype, **tags: Any
) -> Any:
    """TE's grouped tensor around the buffers."""
    made, accepted = _grouped_class(bool(quantizer.internal) if quantizer is not None else False)
    fields = {
        "shape": group.logical,
        "stride": (group.logical[1], 1),
        "dtype": dtype,
        "num_tensors": len(group.shapes),
        "quantizer": quantizer,
        "data": buffers.get("rowwise_data"),
        **{name: buffers.get(name) for name in ARGUMENTS},
        "first_dims": group.first_dims,
        "last_dims": group.last_dims,
        "tensor_offsets": group.offsets,
        "with_gemm_swizzled_scales": False,
        **tags,
    }
    return made(**{name: value for name, value in fields.items() if name in accepted})


def member(layout: Layout, quantizer: Any, group: Group, number: int, grouped: Any) -> dict[str, Tensor]:
    """Views of the buffers of one member, in the shapes that they have alone; of some groups the scales are
    without padding rows.

    Args:
        layout: of the members.
        quantizer: with the usages of the directions that the group has.
        group: the members.
        number: which of them.
        grouped: an object or mapping with the flat buffers.
    """
    found: dict[str, Tensor] = {}
    for name, (shape, _dtype) in layout.specs(quantizer, group.shapes[number]).items():
        flat = grouped[ATTRIBUTES[name]] if isinstance(grouped, dict) else getattr(grouped, ATTRIBUTES[name])
        size = math.prod(shape)
        if name.endswith("_scale_inv") and flat.numel() < len(group.shapes) * size and group.uniform:
            found[name] = _rows_of_one_matrix(layout, quantizer, group, number, name, flat)
            continue
        if name.startswith("_amax"):
            start = number
        elif name.endswith("_data"):
            packed = math.prod(group.shapes[number]) // size if size else 1
            start = group.starts[number] // packed
        else:
            before = (layout.specs(quantizer, each)[name][0] for each in group.shapes[:number])
            start = sum(math.prod(each) for each in before)
        found[name] = flat.view(-1)[start : start + size].view(shape)
    return found


def _rows_of_one_matrix(
    layout: Layout, quantizer: Any, group: Group, number: int, name: str, flat: Tensor
) -> Tensor:
    """Scales of one of several matrices of one shape that were quantised as one: the kernels of MXFP8 pad
    none of them where their rows are no multiple of 128.
    """
    shape = layout.specs(quantizer, group.logical)[name][0]
    rows = group.shapes[number][0] // (32 if name.startswith("_columnwise") else 1)
    return flat.view(-1)[: math.prod(shape)].view(shape)[number * rows : (number + 1) * rows]
