"""FP8 block scaling: 1x128 and 128x1 blocks for activations and gradients, 128x128 for weights, fp32 scales.

Follows Transformer Engine's `transpose/quantize_transpose_vector_blockwise.cu` (1D) and
`quantize_transpose_square_blockwise.cu` (2D). Everything here is in natural layout; the GEMM's transposed and
padded layouts are the caller's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nemo_fp8_recipes.numerics.blocks import BlockShape, dequantize_blocks, quantize_blocks
from nemo_fp8_recipes.numerics.formats import Fp8Format
from nemo_fp8_recipes.numerics.scale import reciprocal, scale_from_amax

__all__ = [
    "BLOCK",
    "Blocks",
    "dequantize_1d",
    "dequantize_1d_columnwise",
    "dequantize_2d",
    "quantize_1d",
    "quantize_1d_columnwise",
    "quantize_2d",
]

BLOCK = 128
_ROWWISE: BlockShape = (1, BLOCK)
_COLUMNWISE: BlockShape = (BLOCK, 1)
_SQUARE: BlockShape = (BLOCK, BLOCK)


class Blocks(NamedTuple):
    """A matrix quantised block by block.

    Attributes:
        codes: uint8 [M, K].
        scale_inv: fp32, one a block, in the order of the blocks.
    """

    codes: Tensor
    scale_inv: Tensor


def quantize_1d(
    x: Tensor, fmt: Fp8Format, *, epsilon: float = 0.0, power_of_two: bool = True, out: Tensor | None = None
) -> Blocks:
    """Quantise in blocks of 1x128, along a row.

    Args:
        x: fp32, bf16 or fp16 [M, K].
        fmt: element format.
        epsilon: lower bound put on every block's amax.
        power_of_two: round the scales down to powers of two.
        out: uint8 [M, K] to write the codes into.

    Returns:
        codes [M, K], scale_inv [M, ceil(K / 128)].
    """
    return _quantize(x, fmt, _ROWWISE, epsilon, power_of_two, out)


def quantize_1d_columnwise(
    x: Tensor, fmt: Fp8Format, *, epsilon: float = 0.0, power_of_two: bool = True, out: Tensor | None = None
) -> Blocks:
    """Quantise in blocks of 128x1, along a column; `quantize_1d` of the transposed matrix, transposed.

    Arguments as `quantize_1d`.

    Returns:
        codes [M, K], scale_inv [ceil(M / 128), K].
    """
    return _quantize(x, fmt, _COLUMNWISE, epsilon, power_of_two, out)


def quantize_2d(
    x: Tensor, fmt: Fp8Format, *, epsilon: float = 0.0, power_of_two: bool = True, out: Tensor | None = None
) -> Blocks:
    """Quantise in blocks of 128x128; codes and scales of the transposed matrix are the transposed ones.

    Arguments as `quantize_1d`.

    Returns:
        codes [M, K], scale_inv [ceil(M / 128), ceil(K / 128)].
    """
    return _quantize(x, fmt, _SQUARE, epsilon, power_of_two, out)


def dequantize_1d(
    codes: Tensor, scale_inv: Tensor, fmt: Fp8Format, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Values of `quantize_1d`'s result in `dtype`: code * scale_inv in fp32, then rounded."""
    return dequantize_blocks(codes, scale_inv, fmt, _ROWWISE, dtype)


def dequantize_1d_columnwise(
    codes: Tensor, scale_inv: Tensor, fmt: Fp8Format, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Values of `quantize_1d_columnwise`'s result in `dtype`: code * scale_inv in fp32, then rounded."""
    return dequantize_blocks(codes, scale_inv, fmt, _COLUMNWISE, dtype)


def dequantize_2d(
    codes: Tensor, scale_inv: Tensor, fmt: Fp8Format, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Values of `quantize_2d`'s result in `dtype`: code * scale_inv in fp32, then rounded."""
    return dequantize_blocks(codes, scale_inv, fmt, _SQUARE, dtype)


def _quantize(
    x: Tensor, fmt: Fp8Format, block: BlockShape, epsilon: float, power_of_two: bool, out: Tensor | None
) -> Blocks:
    overflow_value = torch.finfo(x.dtype).max

    def scale_rule(largest: Tensor) -> tuple[Tensor, Tensor]:
        scale = scale_from_amax(
            largest, fmt.max, epsilon=epsilon, power_of_two=power_of_two, overflow_value=overflow_value
        )
        return scale, reciprocal(scale)

    return Blocks(*quantize_blocks(x, fmt, block, scale_rule, out=out))
