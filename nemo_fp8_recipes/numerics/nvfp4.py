"""NVFP4: E2M1 elements, an E4M3 scale for every 16 of them, one fp32 scale for the tensor.

Follows Transformer Engine's `cast/nvfp4/core_nvfp4.cuh`, `cast/nvfp4/quantize_transpose_nvfp4.cuh`,
`transpose/quantize_transpose_vector_blockwise_fp4.cu` and `cast/nvfp4/dequantize_nvfp4.cuh` with fast math
off. The tensor's scale maps its amax to 448 * 6, so that the scales of the blocks use E4M3's range; it is
never stored: whoever reads the tensor makes it from the amax again.

    global scale    S = 448 * 6 / amax                          (1 for an amax of zero or infinity)
    block's scale   s = E4M3(block amax * (S * fp32(1 / 6)))    to nearest, saturating
    codes           E2M1(x * min(1 / (s * (1 / S)), FLT_MAX))   to nearest or stochastically
    value           code * (s * amax * fp32(1 / (6 * 448)))

Transformer Engine up to 2.13 divides instead: s = E4M3((block amax / 6) * S), which rounds once more and
differs in the last bit of some scales.

Columnwise data is that of the transposed matrix. A NaN does not reach the scales and becomes +6. One kernel
differs there: `row_cast_col_hadamard_transform_cast_fusion.cu`, taken for bf16 matrices of whole tiles with
the Hadamard transform, gives a block with a NaN the scale NaN.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_fp8_recipes.errors import RecipeError
from nemo_fp8_recipes.numerics import cast, fp4
from nemo_fp8_recipes.numerics.blocks import BlockShape, block_amax, join, split
from nemo_fp8_recipes.numerics.formats import E4M3
from nemo_fp8_recipes.numerics.scale import FLT_MAX

__all__ = [
    "BLOCK",
    "Blocks",
    "block_values",
    "dequantize",
    "gemm_scale",
    "global_scale",
    "multiplier",
    "quantize_1d",
    "quantize_2d",
]

BLOCK = 16
_ROWWISE: BlockShape = (1, BLOCK)
_SQUARE: BlockShape = (BLOCK, BLOCK)


@lru_cache(maxsize=32)
def _fp32(value: float) -> float:
    """`value` rounded to fp32."""
    return float(torch.tensor(value, dtype=torch.float32))


_SIXTH = _fp32(1.0 / fp4.E2M1_MAX)
_E4M3_MAX = int(E4M3.max)


class Blocks(NamedTuple):
    """A matrix quantised to NVFP4.

    Attributes:
        packed: uint8 [M, K / 2], two codes a byte, the first in the low half.
        scale_e4m3: uint8, E4M3 codes of the blocks' scales, in the order of the blocks.
    """

    packed: Tensor
    scale_e4m3: Tensor


def global_scale(amax: Tensor, e4m3_max: int = _E4M3_MAX) -> Tensor:
    """What maps a tensor's amax to the largest value that a block can hold, 448 * 6.

    `compute_global_encode_scaling_factor_FP4`: at most FLT_MAX, and 1 for an amax of zero or infinity.

    Args:
        amax: fp32, any shape, not negative.
        e4m3_max: largest scale of a block; 4over6 can leave room above it (`nvfp4_4over6.py`).

    Returns:
        fp32 of the same shape.
    """
    scale = torch.div(torch.full_like(amax, e4m3_max * fp4.E2M1_MAX), amax).clamp_max_(FLT_MAX)
    return torch.where((amax == 0.0) | (scale == 0.0), 1.0, scale)


def quantize_1d(
    x: Tensor,
    amax: Tensor,
    *,
    stochastic: bool = False,
    generator: torch.Generator | None = None,
    divided: bool = False,
) -> Blocks:
    """Quantise in blocks of 1x16, along a row.

    Args:
        x: fp32, bf16 or fp16 [M, K], K a multiple of 16.
        amax: fp32, one element: the tensor's, which need not be x's own (reduced over ranks, say); or M
            elements, one a row ("row-scaled").
        stochastic: round the elements stochastically. The scales are always rounded to nearest.
        generator: where stochastic rounding takes its bits from, torch's default when None.
        divided: find the blocks' scales as Transformer Engine did up to 2.13.

    Returns:
        packed [M, K / 2], scale_e4m3 [M, K / 16].

    Raises:
        RecipeError: K is not a multiple of 16.
    """
    return _quantize(x, amax, _ROWWISE, stochastic, generator, divided)


def quantize_2d(
    x: Tensor,
    amax: Tensor,
    *,
    stochastic: bool = False,
    generator: torch.Generator | None = None,
    divided: bool = False,
) -> Blocks:
    """Quantise in blocks of 16x16; the scales of the transposed matrix are the transposed ones.

    Arguments and errors as `quantize_1d`, with an amax of one element.

    Returns:
        packed [M, K / 2], scale_e4m3 [ceil(M / 16), K / 16].
    """
    return _quantize(x, amax, _SQUARE, stochastic, generator, divided)


def block_values(packed: Tensor, scale_e4m3: Tensor) -> Tensor:
    """code * block scale, exactly: what a GEMM sums before it multiplies with `gemm_scale`.

    Args:
        packed: uint8 [M, K / 2].
        scale_e4m3: uint8 [M, K / 16], or [ceil(M / 16), K / 16] of 16x16 blocks.

    Returns:
        fp32 [M, K].
    """
    return _scaled(packed, cast.decode(scale_e4m3, E4M3))


def dequantize(
    packed: Tensor,
    scale_e4m3: Tensor,
    amax: Tensor,
    dtype: torch.dtype = torch.float32,
    e4m3_max: int = _E4M3_MAX,
) -> Tensor:
    """The values of NVFP4 codes: the scales are multiplied first, in fp32, then the code.

    Args:
        packed: uint8 [M, K / 2].
        scale_e4m3: uint8 [M, K / 16], or [ceil(M / 16), K / 16] of 16x16 blocks.
        amax: fp32, one element, or with 1x16 blocks one a row.
        dtype: dtype of the result.
        e4m3_max: what the global scale was made with.

    Returns:
        [M, K].
    """
    reciprocal = _fp32(1.0 / (e4m3_max * fp4.E2M1_MAX))
    scale = cast.decode(scale_e4m3, E4M3).mul_(amax.reshape(-1, 1)).mul_(reciprocal)
    return _scaled(packed, scale).to(dtype)


def multiplier(scale_e4m3: Tensor, amax: Tensor) -> Tensor:
    """What the values of each block are multiplied with before they are rounded to E2M1.

    Args:
        scale_e4m3: uint8 [blocks down, blocks across].
        amax: fp32, one element, or one for each row of blocks.

    Returns:
        fp32 of scale_e4m3's shape, at most FLT_MAX.
    """
    to_decode = torch.reciprocal(global_scale(amax.detach().reshape(-1, 1)))
    return torch.reciprocal(cast.decode(scale_e4m3, E4M3).mul_(to_decode)).clamp_max_(FLT_MAX)


def gemm_scale(
    amax_a: Tensor,
    amax_b: Tensor,
    alpha: float = 1.0,
    e4m3_max_a: int = _E4M3_MAX,
    e4m3_max_b: int = _E4M3_MAX,
) -> Tensor:
    """What the product of two matrices of `block_values` is multiplied with.

    `compute_nvfp4_per_tensor_scale_kernel` in `recipe/nvfp4.cu`.

    Args:
        amax_a: fp32, one element.
        amax_b: fp32, one element.
        alpha: the caller's own factor.
        e4m3_max_a, e4m3_max_b: what the matrices' global scales were made with.

    Returns:
        fp32 (1,).
    """
    # The product of these whole numbers is exact in fp32.
    reciprocal = _fp32(1.0 / (fp4.E2M1_MAX * fp4.E2M1_MAX * e4m3_max_a * e4m3_max_b))
    return amax_a.reshape(1).mul(_fp32(alpha)).mul_(amax_b.reshape(1)).mul_(reciprocal)


def _quantize(
    x: Tensor,
    amax: Tensor,
    block: BlockShape,
    stochastic: bool,
    generator: torch.Generator | None,
    divided: bool,
) -> Blocks:
    if x.shape[1] % BLOCK:
        raise RecipeError(
            f"NVFP4 quantises blocks of {BLOCK} elements, and the rows have {x.shape[1]}.",
            key="shape",
            value=tuple(x.shape),
        )
    encode_scale = global_scale(amax.detach().reshape(-1, 1))
    x = x.detach()
    largest = block_amax(x, block)
    if divided:
        wanted = largest.div_(fp4.E2M1_MAX).mul_(encode_scale)
    else:
        wanted = largest.mul_(encode_scale * _SIXTH)
    scale = cast.saturating_cast(wanted, E4M3)
    scaled = split(x.to(torch.float32), block) * multiplier(scale, amax)[:, None, :, None]
    scaled = join(scaled, x.shape)
    codes = fp4.encode_stochastically(scaled, generator) if stochastic else fp4.encode(scaled)
    return Blocks(fp4.pack(codes), scale)


def _scaled(packed: Tensor, scale: Tensor) -> Tensor:
    values = fp4.decode_packed(packed)
    block = _ROWWISE if scale.shape[0] == values.shape[0] else _SQUARE
    return join(split(values, block) * scale[:, None, :, None], values.shape)
