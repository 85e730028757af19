"""Amax and the fp32 scale made from it.

The rule of Transformer Engine's `recipe/recipe_common.cuh`, shared by tensorwise and block scaling: the amax
is raised to epsilon; an amax of zero, infinity or NaN gives scale 1; otherwise the scale is fp8_max / amax in
fp32 division; a scale that overflows becomes the overflow value; the power-of-two option then clears the
mantissa (rounds down).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["FLT_MAX", "amax", "magnitude", "reciprocal", "scale_from_amax"]

FLT_MAX = torch.finfo(torch.float32).max

_SIGN_AND_EXPONENT = -0x00800000  # 0xFF800000 as a signed 32-bit integer


def magnitude(x: Tensor) -> Tensor:
    """|x| with NaN as zero, which a maximum over it then ignores as CUDA's fmaxf ignores NaN.

    Args:
        x: fp32, bf16 or fp16.

    Returns:
        A new tensor of x's shape and dtype.
    """
    return x.detach().abs().nan_to_num_(nan=0.0, posinf=math.inf)


def amax(x: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Largest magnitude, NaN ignored.

    Args:
        x: fp32, bf16 or fp16.
        dim: dimensions to reduce, all when None.

    Returns:
        fp32, reduced shape. Zero where every value is NaN or, with `dim` None, where there is no value.
    """
    if dim is None and x.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=x.device)
    return torch.amax(magnitude(x), dim=() if dim is None else dim).to(torch.float32)


def scale_from_amax(
    amax: Tensor,
    fp8_max: float,
    *,
    epsilon: float = 0.0,
    power_of_two: bool = False,
    overflow_value: float = FLT_MAX,
) -> Tensor:
    """The scale that maps an amax to the largest FP8 value.

    Args:
        amax: fp32, any shape, not negative.
        fp8_max: largest finite value of the element format.
        epsilon: lower bound put on the amax.
        power_of_two: round the scale down to a power of two.
        overflow_value: what a scale that overflows fp32 becomes (`FLT_MAX` per tensor, the input dtype's
            largest value for blocks).

    Returns:
        fp32 scale of the same shape; always finite and above zero.
    """
    floored = amax.clamp_min(epsilon) if epsilon > 0.0 else amax
    # A Python number on the left would make torch multiply with a rounded reciprocal instead of dividing.
    scale = torch.div(torch.full_like(floored, fp8_max), floored).nan_to_num_(nan=1.0, posinf=overflow_value)
    if power_of_two:
        scale = scale.view(torch.int32).bitwise_and_(_SIGN_AND_EXPONENT).view(torch.float32)
    usable = (floored > 0.0) & (floored < math.inf)
    return torch.where(usable, scale, 1.0)


def reciprocal(scale: Tensor) -> Tensor:
    """scale_inv = 1 / scale in fp32 division, subnormal results kept."""
    return torch.reciprocal(scale)
