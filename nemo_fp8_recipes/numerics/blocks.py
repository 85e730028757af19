"""Cutting a matrix into blocks, and quantising each block with its own scale.

What block scaling (128) and MXFP8 (32) share. At ragged edges a block covers what is there: the matrix is
padded with zeros, which change no amax, and the padding is dropped from the codes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from nemo_fp8_recipes.numerics.cast import decode, scale_and_cast
from nemo_fp8_recipes.numerics.formats import Fp8Format
from nemo_fp8_recipes.numerics.scale import amax, magnitude

__all__ = ["BlockShape", "block_amax", "dequantize_blocks", "join", "quantize_blocks", "split"]

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


def block_amax(x: Tensor, block: BlockShape) -> Tensor:
    """Largest magnitude of each block, NaN ignored.

    Args:
        x: fp32, bf16 or fp16 [M, K].
        block: rows and columns of a block.

    Returns:
        fp32 [ceil(M / rows), ceil(K / columns)].
    """
    return amax(split(x, block), dim=(1, 3))


def quantize_blocks(
    x: Tensor,
    fmt: Fp8Format,
    block: BlockShape,
    scale_rule: Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantise every block with the scale of its own amax.

    Args:
        x: fp32, bf16 or fp16 [M, K].
        fmt: element format.
        block: rows and columns of a block.
        scale_rule: from the blocks' amax (fp32) to what the values are multiplied with (fp32) and what is
            kept to dequantise them.
        out: uint8 [M, K] to write the codes into.

    Returns:
        uint8 codes [M, K] (`out` when given), and what is kept, [ceil(M / rows), ceil(K / columns)].
    """
    blocks = split(x.detach().to(torch.float32), block)
    magnitudes = magnitude(blocks)
    multiplier, kept = scale_rule(torch.amax(magnitudes, dim=(1, 3)))
    codes = scale_and_cast(blocks, multiplier[:, None, :, None], fmt, scratch=magnitudes)
    codes = join(codes, x.shape)
    return (codes.contiguous() if out is None else out.copy_(codes)), kept


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
