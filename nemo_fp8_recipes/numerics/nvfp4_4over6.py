"""NVFP4 with "four over six": every block is quantised twice, and the better half is kept.

Follows Transformer Engine's `cast/nvfp4/quantize_4over6_nvfp4.cuh`. A block's scale maps its amax to 6 (as
plain NVFP4 does) or to 4 (a scale 1.5 times as large), which puts its largest elements where E2M1 has more
values. What is kept is the one with the smaller error; a tie keeps 6.

    global scale    S = e4m3_max * 6 / amax                       e4m3_max 448, or 256 to leave room for 1.5
    scales          s6 = E4M3(min(block amax / 6 * S, 448)), s4 = E4M3(min(block amax / 6 * S * 1.5, 448))
    codes           E2M1(x * min(1 / (s * (1 / S)), FLT_MAX)) with each
    error           sum over the block of |d| (MAE) or d * d (MSE), one addition after the other,
                    d = code * s * amax / (6 * e4m3_max) - x

With fast error arithmetic (NVTE_NVFP4_4OVER6_ERR_USE_FAST_MATH) d = fp16(code * s) - x * S instead. The error
of a 16x16 block is the sum of its rows' errors, added in the order of the kernel's warp reduction: halves
onto halves.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from nemo_fp8_recipes.errors import RecipeError
from nemo_fp8_recipes.numerics import cast, fp4
from nemo_fp8_recipes.numerics.blocks import block_amax
from nemo_fp8_recipes.numerics.formats import E4M3
from nemo_fp8_recipes.numerics.nvfp4 import BLOCK, Blocks, global_scale
from nemo_fp8_recipes.numerics.scale import FLT_MAX

__all__ = ["ErrorMode", "quantize"]

ErrorMode = Literal["MAE", "MSE"]

_EXPAND = 1.5


def quantize(
    x: Tensor,
    amax: Tensor,
    *,
    square: bool = False,
    e4m3_max: int = 448,
    error_mode: ErrorMode = "MAE",
    fast_error: bool = False,
) -> Blocks:
    """Quantise in blocks of 1x16 along a row, or of 16x16.

    Args:
        x: fp32, bf16 or fp16 [M, K], K a multiple of 16, and M too with `square`.
        amax: fp32, one element; or M elements, one a row, with 1x16 blocks.
        square: one scale for 16x16 elements.
        e4m3_max: largest block scale that the global scale aims at, 448 or 256.
        error_mode: how the two candidates are compared.
        fast_error: compare in the range of the scales, products rounded to fp16.

    Returns:
        packed [M, K / 2], scale_e4m3 [M, K / 16] or [M / 16, K / 16].

    Raises:
        RecipeError: dimensions that blocks do not fill.
    """
    m, k = x.shape
    if k % BLOCK or (square and m % BLOCK):
        raise RecipeError(
            f"NVFP4 quantises blocks of {BLOCK} elements, and the matrix is {m} by {k}.",
            key="shape",
            value=(m, k),
        )
    amax = amax.detach().reshape(-1, 1)
    encode_scale = global_scale(amax, e4m3_max)
    values = x.detach().to(torch.float32).view(m, k // BLOCK, BLOCK)
    largest = block_amax(x.detach(), (BLOCK, BLOCK) if square else (1, BLOCK))
    base = largest.div_(fp4.E2M1_MAX).mul_(encode_scale)
    candidates = []
    for wanted in (base * _EXPAND, base):
        scale = cast.saturating_cast(wanted, E4M3)
        rows = scale.repeat_interleave(BLOCK, dim=0) if square else scale
        s = cast.decode(rows, E4M3)
        multiplier = torch.reciprocal(s * torch.reciprocal(encode_scale)).clamp_max_(FLT_MAX)
        codes = fp4.encode(values * multiplier[..., None])
        packed = fp4.pack(codes.view(m, k))
        decoded = fp4.decode_packed(packed).view(m, k // BLOCK, BLOCK)
        if fast_error:
            product = decoded.to(torch.float16).mul_(s[..., None].to(torch.float16)).to(torch.float32)
            difference = product.sub_(values * encode_scale[..., None])
        else:
            product = decoded.mul_(s[..., None]).mul_(amax[..., None]).div_(fp4.E2M1_MAX * e4m3_max)
            difference = product.sub_(values)
        error = _error(difference, error_mode)
        candidates.append((packed, scale, _over_rows(error) if square else error))
    (packed4, scale4, error4), (packed6, scale6, error6) = candidates
    four = error4 < error6
    blocks = four.repeat_interleave(BLOCK, dim=0) if square else four
    packed = torch.where(blocks.repeat_interleave(BLOCK // 2, dim=1), packed4, packed6)
    return Blocks(packed, torch.where(four, scale4, scale6))


def _error(difference: Tensor, mode: ErrorMode) -> Tensor:
    """fp32 [M, K / 16]: the sum over the last dimension, from its first element to its last."""
    each = difference.abs() if mode == "MAE" else difference.square()
    total = each[..., 0].clone()
    for position in range(1, BLOCK):
        total.add_(each[..., position])
    return total


def _over_rows(error: Tensor) -> Tensor:
    """fp32 [M / 16, K / 16]: 16 rows' errors, the upper half added to the lower until one is left."""
    rows = error.view(-1, BLOCK, error.shape[1])
    while rows.shape[1] > 1:
        half = rows.shape[1] // 2
        rows = rows[:, :half] + rows[:, half:]
    return rows[:, 0]
