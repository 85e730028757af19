"""The two sides of a grouped GEMM: the matrices of all experts, in one grouped tensor or in a list.

Follows `GroupedTensorFromPyTorchGroupedTensor` in `pytorch/csrc/type_converters.cpp`, and
`select_grouped_operand`, `choose_grouped_operand_storage` and `validate_grouped_gemm_multi_inputA_list` in
`common/gemm/cublaslt_grouped_gemm.cu` of Transformer Engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.binding.blockwise import BLOCKWISE
from nemo_fp8_recipes.emulation.binding.checks import nvte_check, nvte_error
from nemo_fp8_recipes.emulation.binding.device import non_tn_fp8_gemm_supported
from nemo_fp8_recipes.emulation.binding.dtypes import element_format, short_name
from nemo_fp8_recipes.emulation.binding.grouped_layout import Group, group_of, member, with_usage
from nemo_fp8_recipes.emulation.binding.mxfp8 import MXFP8
from nemo_fp8_recipes.emulation.binding.nvfp4 import NVFP4
from nemo_fp8_recipes.emulation.binding.operands import NVFP4_SCALING, PER_TENSOR, operand
from nemo_fp8_recipes.emulation.binding.per_tensor import CURRENT
from nemo_fp8_recipes.emulation.binding.releases import release
from nemo_fp8_recipes.emulation.binding.storage import Layout, flat_2d
from nemo_fp8_recipes.emulation.binding.te_classes import te_classes

__all__ = ["CUBLAS", "MOST_MATRICES", "Matrices", "group_members", "matrices_of_group", "matrices_of_list"]

CUBLAS = "common/gemm/cublaslt_grouped_gemm.cu"
MOST_MATRICES = 64
"""How many matrices a list may have: as many as the kernel's arguments have room for."""

_SCALING: dict[str, str] = {"e4m3": "FP8", "e5m2": "FP8", "e2m1": "FP4"}


@dataclass(frozen=True)
class Matrices:
    """All A or all B of a grouped GEMM.

    Attributes:
        name: "A" or "B".
        shapes: of each, as it lies.
        has_rows, has_columns: of which directions there is data.
        format: "e4m3", "e5m2", "e2m1", "fp32", "bf16", "fp16", or another dtype.
        scaling: "none", "tensorwise-or-delayed", "mxfp8", "nvfp4", "block_1d", "block_2d".
        swizzled: whether scales lie in the GEMM's order.
        has_amax: by direction, "rowwise" and "columnwise": whether NVFP4's amaxes are there; of a list, one
            by one.
        take: the tensor of a number, as a GEMM of its own reads it.
        listed: they were given as a list.
    """

    name: str
    shapes: tuple[tuple[int, int], ...]
    has_rows: bool
    has_columns: bool
    format: str
    scaling: str
    swizzled: bool
    has_amax: dict[str, tuple[bool, ...]]
    take: Callable[[int], Any]
    listed: bool = False

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def kind(self) -> str:
        """ "FP8", "FP4" or "" for what is not quantised."""
        return _SCALING.get(self.format, "")

    @property
    def blockwise(self) -> bool:
        return self.scaling in ("block_1d", "block_2d")

    @property
    def mode(self) -> str:
        """Scaling as TE's C++ tells it apart: what is not quantised counts as per tensor."""
        return PER_TENSOR if self.scaling == "none" else self.scaling

    def require_storage(self, transposed: bool) -> None:
        """That there is data of the direction that is read.

        Raises:
            RuntimeError: there is none, in TE's words.
        """
        along_columns = transposed == (self.name == "B")
        has = self.has_columns if along_columns else self.has_rows
        nvte_check(
            self.has_rows or self.has_columns,
            CUBLAS,
            f"Grouped GEMM: {self.name} is missing both row-wise and column-wise data",
        )
        if self.scaling == "mxfp8":
            direction = "column" if along_columns else "row"
            how = "transposed" if transposed else "non-transposed"
            nvte_check(has, CUBLAS, f"Grouped GEMM: MXFP8 {how} {self.name} is missing {direction}-wise data")
            return
        tn_only = self.blockwise or self.scaling == NVFP4_SCALING
        if tn_only or (self.kind and not non_tn_fp8_gemm_supported()):
            if along_columns:
                nvte_check(
                    has,
                    CUBLAS,
                    f"Grouped GEMM: {self.name} is missing column-wise data needed for "
                    f"{'FP8 ' if release().name == '2.14' else ''}TN layout",
                )
            nvte_check(
                has,
                CUBLAS,
                "Grouped GEMM: FP8 on Hopper requires row-wise data for this transpose config."
                if self.kind == "FP8"
                else f"Grouped GEMM: {self.name} is missing row-wise data",
            )

    def read(self, number: int, transposed: bool) -> Any:
        """The operand of one GEMM (`operands.Operand`)."""
        return operand(self.name, self.take(number), columnwise=transposed == (self.name == "B"))


def group_members(grouped: Any) -> Group:
    """The shapes and places of a grouped tensor's matrices."""
    rows, columns = (int(size) for size in grouped.logical_shape)
    return group_of(
        (rows, columns), grouped.num_tensors, grouped.first_dims, grouped.last_dims, grouped.tensor_offsets
    )


def matrices_of_group(name: str, grouped: Any) -> Matrices:
    """The matrices in a grouped tensor."""
    group = group_members(grouped)
    has_rows = grouped.rowwise_data is not None
    has_columns = grouped.columnwise_data is not None
    quantizer = grouped.quantizer
    if quantizer is None:
        data = grouped.rowwise_data if has_rows else grouped.columnwise_data
        dtype = grouped.get_dtype() if data is None else data.dtype
        return Matrices(
            name,
            group.shapes,
            has_rows,
            has_columns,
            short_name(dtype),
            "none",
            False,
            {},
            lambda number: _plain(grouped, group, number),
        )
    return Matrices(
        name,
        group.shapes,
        has_rows,
        has_columns,
        element_format(quantizer.dtype),
        _scaling_of(quantizer),
        # GEMMs bring MXFP8's scales in order by themselves.
        bool(grouped._with_gemm_swizzled_scales) or type(quantizer) is te_classes().mxfp8_quantizer,
        {"rowwise": (grouped.amax is not None,), "columnwise": (grouped.columnwise_amax is not None,)},
        lambda number: _quantized(grouped, group, number),
    )


def _scaling_of(quantizer: Any) -> str:
    classes = te_classes()
    kind = type(quantizer)
    if kind is classes.mxfp8_quantizer:
        return "mxfp8"
    if kind is classes.nvfp4_quantizer:
        return NVFP4_SCALING
    if kind is classes.blockwise_quantizer:
        return "block_2d" if quantizer.block_scaling_dim == 2 else "block_1d"
    if kind in (classes.tensorwise_quantizer, classes.delayed_quantizer):
        return PER_TENSOR
    return nvte_error("pytorch/csrc/type_converters.cpp", f"Unknown quantizer {kind.__name__}.")


def _plain(grouped: Any, group: Group, number: int) -> Tensor:
    rows, columns = group.shapes[number]
    place = slice(group.starts[number], group.starts[number] + rows * columns)
    if grouped.rowwise_data is not None:
        data: Tensor = grouped.rowwise_data.view(-1)[place]
        return data.view(rows, columns)
    transposed: Tensor = grouped.columnwise_data.view(-1)[place]
    return transposed.view(columns, rows).t()


def _quantized(grouped: Any, group: Group, number: int) -> Any:
    """A matrix of a quantised group as a tensor of its own, around the group's buffers."""
    classes = te_classes()
    quantizer = with_usage(
        grouped.quantizer,
        rowwise=grouped.rowwise_data is not None,
        columnwise=grouped.columnwise_data is not None,
    )
    quantizer.internal = True
    shape, dtype, cpu = group.shapes[number], grouped.get_dtype(), torch.device("cpu")
    if _scaling_of(quantizer) == PER_TENSOR:
        return CURRENT.wrap(quantizer, _per_tensor_buffers(grouped, group, number), shape, dtype, cpu)
    layouts: dict[type, Layout] = {
        classes.mxfp8_quantizer: MXFP8,
        classes.nvfp4_quantizer: NVFP4,
        classes.blockwise_quantizer: BLOCKWISE,
    }
    layout = layouts[type(quantizer)]
    made = layout.wrap(quantizer, member(layout, quantizer, group, number, grouped), shape, dtype, cpu)
    release().set_fields(made, with_gemm_swizzled_scales=bool(grouped._with_gemm_swizzled_scales))
    return made


def _per_tensor_buffers(grouped: Any, group: Group, number: int) -> dict[str, Tensor]:
    rows, columns = group.shapes[number]
    place = slice(group.starts[number], group.starts[number] + math.prod(group.shapes[number]))
    inverse = grouped.scale_inv if grouped.rowwise_data is not None else grouped.columnwise_scale_inv
    buffers = {"_scale_inv": inverse.view(-1)[number : number + 1]}
    if grouped.rowwise_data is not None:
        buffers["_data"] = grouped.rowwise_data.view(-1)[place].view(rows, columns)
    if grouped.columnwise_data is not None:
        buffers["_transpose"] = grouped.columnwise_data.view(-1)[place].view(columns, rows)
    return buffers


def matrices_of_list(name: str, tensors: Sequence[Any]) -> Matrices:
    """The matrices in a list of tensors, plain or quantised.

    Raises:
        RuntimeError: too many, or tensors that are not alike, in TE's words.
    """
    listed = f"Grouped GEMM: {name}_list"
    nvte_check(
        len(tensors) <= MOST_MATRICES,
        CUBLAS,
        f"{listed} supports up to {MOST_MATRICES} tensors per kernel, got {len(tensors)}",
    )
    described = [_describe(tensor) for tensor in tensors]
    first = described[0]
    has_rows = all(each.rows is not None for each in described)
    has_columns = all(each.columns is not None for each in described)
    for number, each in enumerate(described):
        nvte_check(each.mode == first.mode, CUBLAS, f"{listed} tensors must share the same scaling mode.")
        for direction, kept in (("row", each.rows), ("column", each.columns)):
            others = [e.format for e in described[:number] if getattr(e, f"{direction}s") is not None]
            nvte_check(
                kept is None or not others or each.format == others[0],
                CUBLAS,
                f"{listed} {direction}wise dtypes must match.",
            )
        nvte_check(len(each.shape) == 2, CUBLAS, f"{listed} tensor {number} must be 2D.")
    return Matrices(
        name,
        tuple(flat_2d(each.shape) for each in described),
        has_rows,
        has_columns,
        first.format,
        first.scaling,
        True,  # GEMMs bring the scales of a list in order by themselves
        {
            direction: tuple(each.amax[direction] for each in described)
            for direction in ("rowwise", "columnwise")
        },
        lambda number: tensors[number],
        listed=True,
    )


@dataclass(frozen=True)
class _Described:
    shape: tuple[int, ...]
    rows: Tensor | None
    columns: Tensor | None
    format: str
    scaling: str
    amax: dict[str, bool]

    @property
    def mode(self) -> str:
        return PER_TENSOR if self.scaling == "none" else self.scaling


def _describe(tensor: Any) -> _Described:
    classes = te_classes()
    nothing = {"rowwise": False, "columnwise": False}
    if not isinstance(tensor, classes.quantized_storage):
        return _Described(tuple(tensor.shape), tensor, None, short_name(tensor.dtype), "none", nothing)
    if isinstance(tensor, classes.float8_storage):
        columns = None if tensor._transpose_invalid else tensor._transpose
        rows, scaling, tag = tensor._data, PER_TENSOR, tensor._fp8_dtype
        shape = CURRENT.shape_of(tensor)
    else:
        rows, columns = tensor._rowwise_data, tensor._columnwise_data
        if isinstance(tensor, classes.nvfp4_storage):
            shape, scaling, tag = NVFP4.shape_of(tensor), NVFP4_SCALING, tensor._fp4_dtype
        elif isinstance(tensor, classes.mxfp8_storage):
            shape, scaling, tag = MXFP8.shape_of(tensor), "mxfp8", tensor._fp8_dtype
        else:
            shape, tag = BLOCKWISE.shape_of(tensor), tensor._fp8_dtype
            scaling = "block_2d" if tensor._is_2D_scaled else "block_1d"
    amax = {
        direction: getattr(tensor, f"_amax_{direction}", None) is not None
        for direction in ("rowwise", "columnwise")
    }
    return _Described(tuple(shape), rows, columns, element_format(tag), scaling, amax)
