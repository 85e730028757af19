"""Grouped tensors: what is quantised for all experts at once, read as one matrix of all rows.

Transformer Engine keeps the experts of a grouped tensor one behind the other
(`transformer_engine/pytorch/tensor/storage/grouped_tensor_storage.py`), and how many rows each has on the
device, where asking would wait for it. Experts of whole tiles of 128 rows, rowwise, lie as one matrix would;
what they have each of their own are amaxes and per-tensor scales, and the place of fp32 block scales.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nemo_fp8_recipes.telemetry.seam import grouped_kinds

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Experts", "OneMatrix", "is_grouped", "one_matrix"]

_BLOCK = 128


def is_grouped(value: object) -> bool:
    """Whether `value` is one of Transformer Engine's grouped tensors, or the storage of one."""
    return grouped_kinds[type(value)]


@dataclass(frozen=True)
class Experts:
    """Whose rows the rows of a matrix are.

    Attributes:
        members: how many experts.
        of_row: expert of each row, int64 (rows,). Rows behind the last one's count as its own.
    """

    members: int
    of_row: Tensor

    def largest(self, of_rows: Tensor) -> Tensor:
        """The largest number of each expert's rows, (members,), of numbers (rows,) that are not negative; 0
        of an expert without rows.
        """
        return of_rows.new_zeros(self.members).scatter_reduce_(0, self.of_row, of_rows, "amax")


@dataclass(slots=True)
class OneMatrix:
    """All experts of a grouped tensor, with the attributes of a tensor of its format. A view: nothing is
    launched or copied for it.

    Attributes:
        members: how many experts.
        rows: of all of them.
        first_dims: rows of each, int64 on the device; None where all have the same.
    """

    members: int
    rows: int
    first_dims: Tensor | None
    _rowwise_data: Tensor | None = None
    _rowwise_scale_inv: Tensor | None = None
    _columnwise_data: Tensor | None = None
    _columnwise_scale_inv: Tensor | None = None
    _with_gemm_swizzled_scales: bool = False
    _amax_rowwise: Tensor | None = None
    _amax_columnwise: Tensor | None = None
    _data: Tensor | None = None
    _transpose: Tensor | None = None
    _transpose_invalid: bool = False
    _scale_inv: Tensor | None = None
    amax: Tensor | None = None

    def with_values(self) -> OneMatrix:
        """The same, to look at the values: one number of an expert becomes one of each of its rows, and fp32
        block scales lie as those of one matrix. A few kernels.
        """
        if self.members == 1:
            return self
        changes: dict[str, Any] = {}
        if self._amax_rowwise is not None:
            changes["_amax_rowwise"] = self._amax_rowwise[self._experts()]
        if self._scale_inv is not None:
            changes["_scale_inv"] = self._scale_inv[self._experts()]
        scales = self._rowwise_scale_inv
        if scales is not None and scales.dtype == torch.float32 and scales.shape[1] == self.rows:
            changes["_rowwise_scale_inv"] = self._together(scales)
        return dataclasses.replace(self, **changes)

    def used_rows(self) -> Tensor | None:
        """How many rows, from the first one on, belong to an expert: int64, one element, on the device; None:
        all of them. What lies in the others was not written, and what they were made of is not used.
        """
        return None if self.first_dims is None else self.first_dims.sum()

    def experts(self) -> Experts | None:
        """Whose rows these are; None where there is one expert."""
        return None if self.members == 1 else Experts(self.members, self._experts())

    def _experts(self) -> Tensor:
        """Expert of each row, int64 (rows,). Rows behind the last one's count as its own."""
        device = self._device
        if self.first_dims is None:
            return torch.arange(self.rows, device=device) // (self.rows // self.members)
        ends = self.first_dims.cumsum(0)
        rows = torch.arange(self.rows, device=device)
        return torch.bucketize(rows, ends, right=True).clamp_max_(self.members - 1)

    def _together(self, scales: Tensor) -> Tensor:
        """Scales of 1x128 blocks, (ceil(columns / 128), rows), from those of the experts one by one."""
        experts, across = self._experts(), scales.shape[0]
        if self.first_dims is None:
            count = torch.full((self.members,), self.rows // self.members, device=scales.device)
        else:
            count = self.first_dims
        start, count = (count.cumsum(0) - count)[experts], count[experts]
        row = torch.arange(self.rows, device=scales.device) - start
        block = torch.arange(across, device=scales.device)[:, None]
        return scales.reshape(-1)[start * across + block * count + row]

    @property
    def _device(self) -> torch.device:
        kept = self._rowwise_data if self._rowwise_data is not None else self._data
        assert kept is not None
        return kept.device


def one_matrix(grouped: Any, quantizer: Any) -> OneMatrix | None:
    """The experts of `grouped`, which `quantizer` made, as one matrix.

    Returns:
        None where they are none: of several experts the columnwise data alone is kept, or rows that are no
        whole tiles.
    """
    reader = _READERS.get(type(quantizer).__name__)
    rows, columns = (int(size) for size in grouped.logical_shape)
    if reader is None or grouped.last_dims is not None or not rows or not columns:
        return None
    made = OneMatrix(int(grouped.num_tensors), rows, grouped.first_dims)
    made._with_gemm_swizzled_scales = bool(getattr(grouped, "_with_gemm_swizzled_scales", False))
    return made if reader(made, grouped, quantizer, columns) else None


def _mxfp8(made: OneMatrix, grouped: Any, _quantizer: Any, columns: int) -> bool:
    if grouped.rowwise_data is not None:
        made._rowwise_data = grouped.rowwise_data.view(made.rows, columns)
        made._rowwise_scale_inv = grouped.scale_inv.view(-1, _padded(-(-columns // 32), 4))
        return made.members == 1 or made.rows % _BLOCK == 0
    if grouped.columnwise_data is None or made.members > 1:
        return False
    made._columnwise_data = grouped.columnwise_data.view(made.rows, columns)
    made._columnwise_scale_inv = grouped.columnwise_scale_inv.view(-1, _padded(columns, _BLOCK))
    return True


def _nvfp4(made: OneMatrix, grouped: Any, _quantizer: Any, columns: int) -> bool:
    if grouped.rowwise_data is not None:
        made._rowwise_data = grouped.rowwise_data.view(made.rows, columns // 2)
        made._rowwise_scale_inv = grouped.scale_inv.view(-1, _padded(-(-columns // 16), 4))
        made._amax_rowwise = grouped.amax
        return made.members == 1 or made.rows % _BLOCK == 0
    if grouped.columnwise_data is None or made.members > 1:
        return False
    made._columnwise_data = grouped.columnwise_data.view(columns, made.rows // 2)
    made._columnwise_scale_inv = grouped.columnwise_scale_inv.view(-1, _padded(-(-made.rows // 16), 4))
    made._amax_columnwise = grouped.columnwise_amax
    return True


def _per_tensor(made: OneMatrix, grouped: Any, _quantizer: Any, columns: int) -> bool:
    made.amax = grouped.amax
    if grouped.rowwise_data is not None:
        made._data = grouped.rowwise_data.view(made.rows, columns)
        made._scale_inv = grouped.scale_inv
        return True
    if grouped.columnwise_data is None or made.members > 1:
        return False
    made._transpose = grouped.columnwise_data.view(columns, made.rows)
    made._scale_inv = grouped.columnwise_scale_inv
    return True


def _blockwise(made: OneMatrix, grouped: Any, quantizer: Any, columns: int) -> bool:
    if made.rows % _BLOCK:
        return False
    square = quantizer.block_scaling_dim == 2
    across = -(-columns // _BLOCK)
    if grouped.rowwise_data is not None:
        made._rowwise_data = grouped.rowwise_data.view(made.rows, columns)
        shape = (-1, _padded(across, 4)) if square else (across, -1)
        made._rowwise_scale_inv = grouped.scale_inv.view(shape)
        return True
    if grouped.columnwise_data is None or made.members > 1:
        return False
    made._columnwise_data = grouped.columnwise_data.view(columns, made.rows)
    shape = (across, -1) if square else (made.rows // _BLOCK, -1)
    made._columnwise_scale_inv = grouped.columnwise_scale_inv.view(shape)
    return True


def _padded(size: int, to: int) -> int:
    return -(-size // to) * to


_READERS: Mapping[str, Callable[[OneMatrix, Any, Any, int], bool]] = {
    "MXFP8Quantizer": _mxfp8,
    "NVFP4Quantizer": _nvfp4,
    "Float8CurrentScalingQuantizer": _per_tensor,
    "Float8BlockQuantizer": _blockwise,
}
