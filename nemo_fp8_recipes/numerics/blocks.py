"""Cutting a matrix into blocks, and quantising each block with its own scale.

What block scaling (128) and MXFP8 (32) share. At ragged edges a block covers what is there: the matrix is
padded with zeros, which change no amax, and the padding is dropped from the codes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from nemo_fp8_recipes.numerics.cast import decode, scale_and_cast
from nemo_fp8_recipes.numerics.formats import Fp8Format
from nemo_fp8_recipes.numerics.scale import amax

__all__ = ["BlockShape", "block_amax", "cast_blocks", "dequantize_blocks", "join", "split"]

BlockShape = tuple[int, int]


def split(x: Tensor, block: BlockShape) -> Tensor:
    """View a matrix as blocks.

    Args:
        x: [M, K].
        block: rows and columns of a block.

    Returns:
        [ceil(M / rows), rows, ceil(K / columns), columns], zero-padded at ragged edges; a view of x where
        there are none.
    """
    rows, columns = block
    m, k = x.shape
    if m % rows or k % columns:
        x = pad(x, (0, -k % columns, 0, -m % rows))
    return x.reshape(-(-m // rows), rows, -(-k // columns), columns)


def join(blocks: Tensor, shape: torch.Size) -> Tensor:
    """The matrix that `split` cut, its padding dropped.

    Args:
        blocks: [Mb, rows, Kb, columns], contiguous.
        shape: (M, K) of the matrix.

    Returns:
        [M, K], a view.
    """
    row_blocks, rows, column_blocks, columns = blocks.shape
    return blocks.view(row_blocks * rows, column_blocks * columns)[: shape[0], : shape[1]]


def block_amax(blocks: Tensor) -> Tensor:
    """Largest magnitude of each block, NaN ignored.

    Args:
        blocks: fp32 [Mb, rows, Kb, columns].

    Returns:
        fp32 [Mb, Kb].
    """
    return amax(blocks, dim=(1, 3))


def cast_blocks(
    blocks: Tensor, scale: Tensor, fmt: Fp8Format, shape: torch.Size, *, out: Tensor | None = None
) -> Tensor:
    """FP8 codes of every block under its scale.

    Args:
        blocks: fp32 [Mb, rows, Kb, columns].
        scale: fp32 [Mb, Kb].
        fmt: element format.
        shape: (M, K) of the matrix.
        out: uint8 [M, K] to write into.

    Returns:
        uint8 [M, K] (`out` when given).
    """
    codes = join(scale_and_cast(blocks, scale[:, None, :, None], fmt), shape)
    return codes.contiguous() if out is None else out.copy_(codes)


def dequantize_blocks(
    codes: Tensor, scale_inv: Tensor, fmt: Fp8Format, block: BlockShape, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The values of block-scaled codes: code * scale_inv in fp32, then rounded to `dtype`.

    Args:
        codes: uint8 [M, K].
        scale_inv: fp32 [ceil(M / rows), ceil(K / columns)].
        fmt: element format.
        block: rows and columns of a block.
        dtype: dtype of the result.
    """
    values = split(decode(codes, fmt), block).mul_(scale_inv[:, None, :, None])
    return join(values, codes.shape).to(dtype).contiguous()
