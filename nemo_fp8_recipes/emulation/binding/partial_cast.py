"""FP8 primary weights: quantising the shard of a weight that one rank owns.

The distributed optimizer holds a contiguous piece of the flattened fp32 master weight, from `start_offset`.
Each rank computes the amax of its piece of every block, the amaxes are reduced over ranks, and each rank
casts its piece with the scale of the whole block.

Follows `pytorch/csrc/extensions/fp8_partial_cast.cpp`, `common/recipe/fp8_block_scaling.cu` and
`common/recipe/mxfp8_scaling.cu` of Transformer Engine.
"""

# ruff: noqa: ARG001  # signatures are pybind's
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.binding.checks import nvte_check
from nemo_fp8_recipes.emulation.binding.dtypes import fp8_format
from nemo_fp8_recipes.numerics.blocks import block_amax
from nemo_fp8_recipes.numerics.cast import scale_and_cast
from nemo_fp8_recipes.numerics.e8m0 import e8m0_reciprocal
from nemo_fp8_recipes.numerics.formats import E4M3

__all__ = [
    "fp8_block_scaling_compute_partial_amax",
    "fp8_block_scaling_partial_cast",
    "mxfp8_scaling_compute_partial_amax",
    "mxfp8_scaling_partial_cast",
]

SOURCE = "pytorch/csrc/extensions/fp8_partial_cast.cpp"

BLOCK = 128
MX_BLOCK = 32


def in_place_of_whole(piece: Tensor, rows: int, columns: int, start_offset: int) -> Tensor:
    """The [rows, columns] matrix with the piece where it belongs and zeros elsewhere; fp32."""
    whole = torch.zeros(rows * columns, dtype=torch.float32, device=piece.device)
    whole[start_offset : start_offset + piece.numel()] = piece.detach().reshape(-1)
    return whole.view(rows, columns)


def positions(count: int, columns: int, start_offset: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column in the matrix of every element of a piece."""
    index = torch.arange(start_offset, start_offset + count, device=device)
    return index // columns, index % columns


def fp8_block_scaling_compute_partial_amax(
    tensor: Tensor, amax: Tensor, h: int, w: int, start_offset: int, block_len: int
) -> None:
    """Amax of the piece in every 128x128 block of the [h, w] weight, into `amax` fp32 [ceil(h/128),
    ceil(w/128)]; zero for a block that the piece does not touch.
    """
    nvte_check(block_len == BLOCK, SOURCE, "Currently only block_len = 128 is supported")
    nvte_check(amax.dim() == 2, SOURCE, "amax must be a 2D tensor")
    nvte_check(amax.dtype == torch.float32, SOURCE, "amax must be a float tensor")
    found = block_amax(in_place_of_whole(tensor, h, w, start_offset), (BLOCK, BLOCK))
    amax[: found.shape[0], : found.shape[1]].copy_(found)


def fp8_block_scaling_partial_cast(
    inp: Tensor,
    out: Tensor,
    scale: Tensor,
    h: int,
    w: int,
    start_offset: int,
    block_len: int,
    out_dtype: Any,
) -> None:
    """Cast a piece with the scales fp32 [ceil(h/128), >= ceil(w/128)] of its 128x128 blocks into `out`, uint8
    codes.
    """
    nvte_check(block_len == BLOCK, SOURCE, "Currently only block_len = 128 is supported")
    nvte_check(scale.dim() == 2, SOURCE, "scale must be a 2D tensor")
    nvte_check(scale.dtype == torch.float32, SOURCE, "scale must be a float tensor")
    nvte_check(out.dtype == torch.uint8, SOURCE, "output must be a uint8 tensor")
    piece = inp.detach().reshape(-1)
    row, column = positions(piece.numel(), w, start_offset, piece.device)
    codes = scale_and_cast(piece, scale[row // BLOCK, column // BLOCK], fp8_format(out_dtype))
    out.copy_(codes.view(out.shape))


def mxfp8_scaling_compute_partial_amax(
    input: Tensor, amax_rowwise: Tensor, amax_colwise: Tensor, rows: int, cols: int, start_offset: int
) -> None:
    """Amax of the piece in every 1x32 and 32x1 block of the [rows, cols] weight, in the input's dtype."""
    _check_mxfp8(rows, cols)
    whole = in_place_of_whole(input, rows, cols, start_offset)
    rowwise = block_amax(whole, (1, MX_BLOCK))
    colwise = block_amax(whole, (MX_BLOCK, 1))
    amax_rowwise[: rowwise.shape[0], : rowwise.shape[1]].copy_(rowwise)
    amax_colwise[: colwise.shape[0], : colwise.shape[1]].copy_(colwise)


def mxfp8_scaling_partial_cast(
    input: Tensor,
    output_rowwise: Tensor,
    output_colwise: Tensor,
    scale_inv_rowwise: Tensor,
    scale_inv_colwise: Tensor,
    rows: int,
    cols: int,
    start_offset: int,
) -> None:
    """Cast a piece with the E8M0 scales of its 1x32 and of its 32x1 blocks (natural order) into two uint8
    outputs.
    """
    _check_mxfp8(rows, cols)
    piece = input.detach().reshape(-1)
    row, column = positions(piece.numel(), cols, start_offset, piece.device)
    rowwise = e8m0_reciprocal(scale_inv_rowwise[row, column // MX_BLOCK])
    colwise = e8m0_reciprocal(scale_inv_colwise[row // MX_BLOCK, column])
    output_rowwise.copy_(scale_and_cast(piece, rowwise, E4M3).view(output_rowwise.shape))
    output_colwise.copy_(scale_and_cast(piece, colwise, E4M3).view(output_colwise.shape))


def _check_mxfp8(rows: int, cols: int) -> None:
    source = "common/recipe/mxfp8_scaling.cu"
    nvte_check(rows % MX_BLOCK == 0, source, "rows must be divisible by 32")
    nvte_check(cols % MX_BLOCK == 0, source, "cols must be divisible by 32")
