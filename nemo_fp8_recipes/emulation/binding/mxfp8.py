"""MXFP8: blocks of 32 values with an E8M0 scale, quantised separately along rows and along columns.

Follows `MXFP8Quantizer` in `pytorch/csrc/quantizer.cpp` and `cast/mxfp8/quantize_mxfp8.cuh`. Buffers:
`_rowwise_data` and `_columnwise_data` (both in the shape of the tensor), `_rowwise_scale_inv` uint8 [M
rounded up to 128, K/32 rounded up to 4], `_columnwise_scale_inv` uint8 [M/32 rounded up to 4, K rounded up to
128]; padding is zero. With the quantizer's `optimize_for_gemm` the scales are in the GEMM's swizzled order
(see `swizzle.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation import kernels
from nemo_fp8_recipes.emulation.binding.block_storage import (
    ATTRIBUTES,
    data_of,
    pad_to,
    round_up,
    wrap,
)
from nemo_fp8_recipes.emulation.binding.checks import nvte_check
from nemo_fp8_recipes.emulation.binding.dtypes import fp8_format
from nemo_fp8_recipes.emulation.binding.releases import release
from nemo_fp8_recipes.emulation.binding.storage import (
    SOURCE,
    Buffers,
    BufferSpec,
    allocate,
    direction_of,
    flat_2d,
)
from nemo_fp8_recipes.emulation.binding.te_classes import element_type, te_classes
from nemo_fp8_recipes.numerics import mxfp8

__all__ = ["MXFP8", "Mxfp8Scaling", "columnwise_scale_shape", "rowwise_scale_shape", "swizzle", "unswizzle"]

BLOCK = mxfp8.BLOCK
# A scale tile of the GEMM: 128 rows (of the operand as the GEMM reads it) by 4 blocks along k.
TILE_M, TILE_K = 128, 4


def rowwise_scale_shape(m: int, k: int) -> tuple[int, int]:
    """Padded shape of the rowwise scales of an [m, k] matrix."""
    return (round_up(m, TILE_M), round_up(k // BLOCK, TILE_K))


def columnwise_scale_shape(m: int, k: int) -> tuple[int, int]:
    """Padded shape of the columnwise scales of an [m, k] matrix."""
    return (round_up(m // BLOCK, TILE_K), round_up(k, TILE_M))


def swizzle(scales: Tensor, *, columnwise: bool) -> Tensor:
    """Scales in the order in which cuBLAS reads them: tiles of 128 x 4, in each the 32 rows r, r+32, r+64,
    r+96.

    Follows `common/swizzle/swizzle.cu`.

    Args:
        scales: uint8, padded, natural order.
        columnwise: the scales run along columns; they are transposed first.

    Returns:
        uint8 of the same shape.
    """
    by_row = scales.t() if columnwise else scales
    m, k = by_row.shape
    tiles = by_row.reshape(m // TILE_M, 4, 32, k // TILE_K, TILE_K)
    return tiles.permute(0, 3, 2, 1, 4).reshape(scales.shape)


def unswizzle(scales: Tensor, *, columnwise: bool) -> Tensor:
    """The inverse of `swizzle`."""
    m, k = reversed(scales.shape) if columnwise else scales.shape
    tiles = scales.reshape(m // TILE_M, k // TILE_K, 32, 4, TILE_K)
    by_row = tiles.permute(0, 3, 2, 1, 4).reshape(m, k)
    return by_row.t() if columnwise else by_row


class Mxfp8Scaling:
    """Storage of `MXFP8Quantizer`."""

    attributes: tuple[str, ...] = ATTRIBUTES

    def specs(self, quantizer: Any, shape: Sequence[int]) -> dict[str, BufferSpec]:
        m, k = flat_2d(shape)
        nvte_check(
            bool(shape) and m % BLOCK == 0 and k % BLOCK == 0,
            SOURCE,
            f"MXFP8 requires tensor dims that are divisible by {BLOCK} (got shape={tuple(shape)})",
        )
        specs: dict[str, BufferSpec] = {}
        if quantizer.rowwise_usage:
            specs["_rowwise_data"] = (tuple(shape), torch.uint8)
            specs["_rowwise_scale_inv"] = (rowwise_scale_shape(m, k), torch.uint8)
        if quantizer.columnwise_usage:
            specs["_columnwise_data"] = (tuple(shape), torch.uint8)
            specs["_columnwise_scale_inv"] = (columnwise_scale_shape(m, k), torch.uint8)
        return specs

    def shape_of(self, tensor: Any) -> tuple[int, ...]:
        refusal = f"MXFP8Quantizer must output to MXFP8Tensor, got {type(tensor).__name__}."
        rowwise, columnwise = data_of(tensor, te_classes().mxfp8_storage, refusal, "MXFP8Tensor")
        if rowwise is not None and columnwise is not None:
            nvte_check(
                rowwise.shape == columnwise.shape,
                SOURCE,
                f"MXFP8 row-wise data (shape={tuple(rowwise.shape)}) and column-wise data "
                f"(shape={tuple(columnwise.shape)}) do not match",
            )
        return tuple((tensor._columnwise_data if rowwise is None else rowwise).shape)

    def encode(self, quantizer: Any, x: Tensor) -> Buffers:
        fmt = fp8_format(quantizer.dtype)
        square = bool(release().option(quantizer, "with_2d_quantization"))
        swizzled = _swizzled(quantizer)
        matrix = x.view(flat_2d(x.shape))
        compiled = kernels.for_tensor(x)
        if compiled is not None:
            buffers = allocate(self, quantizer, x.shape, x.device, zero_scales=True)
            compiled.mxfp8(
                matrix,
                fmt,
                direction_of(buffers, "rowwise"),
                direction_of(buffers, "columnwise"),
                square=square,
                swizzled=swizzled,
            )
            return buffers
        specs = self.specs(quantizer, x.shape)
        buffers = {}

        def keep(direction: str, codes: Tensor, scale: Tensor) -> None:
            padded = pad_to(scale, specs[f"_{direction}_scale_inv"][0])
            if swizzled:
                padded = swizzle(padded, columnwise=direction == "columnwise")
            buffers[f"_{direction}_data"] = codes.view(x.shape)
            buffers[f"_{direction}_scale_inv"] = padded

        if square:
            codes, scale = mxfp8.quantize_2d(matrix, fmt)
            if "_rowwise_data" in specs:
                keep("rowwise", codes, scale.repeat_interleave(BLOCK, dim=0))
            if "_columnwise_data" in specs:
                own = codes.clone() if "_rowwise_data" in specs else codes
                keep("columnwise", own, scale.repeat_interleave(BLOCK, dim=1))
            return buffers
        if "_rowwise_data" in specs:
            keep("rowwise", *mxfp8.quantize_rowwise(matrix, fmt))
        if "_columnwise_data" in specs:
            keep("columnwise", *mxfp8.quantize_columnwise(matrix, fmt))
        return buffers

    def wrap(
        self,
        quantizer: Any,
        buffers: Mapping[str, Tensor],
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Any:
        classes = te_classes()
        fields = {
            "fp8_dtype": element_type(quantizer.dtype),
            "with_gemm_swizzled_scales": _swizzled(quantizer),
        }
        kinds = (classes.mxfp8_storage, classes.mxfp8_tensor)
        return wrap(quantizer, buffers, self.attributes, fields, kinds, shape, dtype, device)

    def retag(self, quantizer: Any, tensor: Any) -> None:
        tensor._fp8_dtype = element_type(quantizer.dtype)
        release().set_fields(tensor, with_gemm_swizzled_scales=_swizzled(quantizer))


def _swizzled(quantizer: Any) -> bool:
    """Whether the quantizer asks for scales in the GEMM's order."""
    return bool(release().option(quantizer, "optimize_for_gemm"))


MXFP8 = Mxfp8Scaling()
