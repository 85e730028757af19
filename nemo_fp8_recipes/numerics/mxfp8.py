"""MXFP8: blocks of 32 values with an E8M0 (power-of-two) scale.

Follows Transformer Engine's `cast/mxfp8/quantize_mxfp8.cuh`, `util/ptx_arch_spec.cuh` (`float_to_e8m0`) and
`util/ptx.cuh` (`exp2f_rcp`, `exp2f`). Rowwise and columnwise data are each quantised from high precision. The
kernel asks for dimensions divisible by 32; ragged edges are quantised here as it would with its zero fill.

A NaN does not reach the scale of its block and becomes a NaN code; a block of nothing but NaN has scale 0x00.
One kernel differs there: `cast/mxfp8/specialized`, taken for bf16 and fp16 matrices that are quantised in
both directions, gives a columnwise block of nothing but NaN the scale 0xFF. Its codes are NaN either way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nemo_fp8_recipes.numerics.blocks import BlockShape, dequantize_blocks, quantize_blocks
from nemo_fp8_recipes.numerics.e8m0 import e8m0_from_amax, e8m0_reciprocal, e8m0_to_fp32
from nemo_fp8_recipes.numerics.formats import Fp8Format

__all__ = [
    "BLOCK",
    "Blocks",
    "dequantize_2d",
    "dequantize_columnwise",
    "dequantize_rowwise",
    "e8m0_from_amax",
    "e8m0_reciprocal",
    "e8m0_to_fp32",
    "quantize_2d",
    "quantize_columnwise",
    "quantize_rowwise",
]

BLOCK = 32
_ROWWISE: BlockShape = (1, BLOCK)
_COLUMNWISE: BlockShape = (BLOCK, 1)
_SQUARE: BlockShape = (BLOCK, BLOCK)


class Blocks(NamedTuple):
    """A matrix quantised to MXFP8.

    Attributes:
        codes: uint8 [M, K].
        scale_e8m0: uint8, one a block, in the order of the blocks: the biased exponent of the scale that
            dequantises.
    """

    codes: Tensor
    scale_e8m0: Tensor


def quantize_rowwise(x: Tensor, fmt: Fp8Format, *, out: Tensor | None = None) -> Blocks:
    """Quantise in blocks of 1x32, along a row.

    Args:
        x: fp32, bf16 or fp16 [M, K].
        fmt: element format.
        out: uint8 [M, K] to write the codes into.

    Returns:
        codes [M, K], scale_e8m0 [M, ceil(K / 32)].
    """
    return _quantize(x, fmt, _ROWWISE, out)


def quantize_columnwise(x: Tensor, fmt: Fp8Format, *, out: Tensor | None = None) -> Blocks:
    """Quantise in blocks of 32x1, along a column.

    Arguments as `quantize_rowwise`.

    Returns:
        codes [M, K] (not transposed), scale_e8m0 [ceil(M / 32), K].
    """
    return _quantize(x, fmt, _COLUMNWISE, out)


def quantize_2d(x: Tensor, fmt: Fp8Format, *, out: Tensor | None = None) -> Blocks:
    """Quantise in blocks of 32x32, the option for weights: rowwise and columnwise codes are then the same.

    Arguments as `quantize_rowwise`.

    Returns:
        codes [M, K], scale_e8m0 [ceil(M / 32), ceil(K / 32)].
    """
    return _quantize(x, fmt, _SQUARE, out)


def dequantize_rowwise(
    codes: Tensor, scale_e8m0: Tensor, fmt: Fp8Format, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Values of `quantize_rowwise`'s result in `dtype`: code * 2^(scale - 127) in fp32, then rounded."""
    return dequantize_blocks(codes, e8m0_to_fp32(scale_e8m0), fmt, _ROWWISE, dtype)


def dequantize_columnwise(
    codes: Tensor, scale_e8m0: Tensor, fmt: Fp8Format, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Values of `quantize_columnwise`'s result in `dtype`: code * 2^(scale - 127) in fp32, then rounded."""
    return dequantize_blocks(codes, e8m0_to_fp32(scale_e8m0), fmt, _COLUMNWISE, dtype)


def dequantize_2d(
    codes: Tensor, scale_e8m0: Tensor, fmt: Fp8Format, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Values of `quantize_2d`'s result in `dtype`: code * 2^(scale - 127) in fp32, then rounded."""
    return dequantize_blocks(codes, e8m0_to_fp32(scale_e8m0), fmt, _SQUARE, dtype)


def _quantize(x: Tensor, fmt: Fp8Format, block: BlockShape, out: Tensor | None) -> Blocks:
    def scale_rule(largest: Tensor) -> tuple[Tensor, Tensor]:
        scale_e8m0 = e8m0_from_amax(largest, fmt)
        return e8m0_reciprocal(scale_e8m0), scale_e8m0

    return Blocks(*quantize_blocks(x, fmt, block, scale_rule, out=out))
