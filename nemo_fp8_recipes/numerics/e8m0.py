"""E8M0, the scale format of MXFP8: a biased exponent, value 2^(code - 127), 0xFF is NaN.

Follows `float_to_e8m0` (`util/ptx_arch_spec.cuh`), `exp2f_rcp` and `exp2f` (`util/ptx.cuh`) of Transformer
Engine. All by bit operations, so every result is exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nemo_fp8_recipes.numerics.formats import Fp8Format

__all__ = ["E8M0_MAX", "E8M0_NAN", "e8m0_from_amax", "e8m0_reciprocal", "e8m0_to_fp32"]

E8M0_MAX = 0xFE
E8M0_NAN = 0xFF

_MANTISSA_BITS = 23
_MANTISSA = (1 << _MANTISSA_BITS) - 1
_TWO_POW_MINUS_127_BITS = 0x00400000  # an fp32 subnormal: no exponent field can express it
_TWO_POW_MINUS_127 = math.ldexp(1.0, -127)


def e8m0_from_amax(amax: Tensor, fmt: Fp8Format) -> Tensor:
    """The scale code of a block: amax * fp32(1 / fp8_max) rounded up to a power of two.

    Rounding up means that the largest value never overflows. Zero and everything up to 2^-127 gives 0x00
    (2^-127), infinity and everything above 2^127 gives 0xFE, NaN gives 0xFF.

    Args:
        amax: fp32, any shape, not negative.
        fmt: element format.

    Returns:
        uint8 of the same shape.
    """
    wanted = torch.mul(amax, fmt.max_reciprocal)
    bits = wanted.view(torch.int32)
    # Adding a full mantissa carries into the exponent exactly when the mantissa is not zero.
    exponent = torch.bitwise_right_shift(bits + _MANTISSA, _MANTISSA_BITS).clamp_max_(E8M0_MAX)
    exponent = torch.where(bits <= _TWO_POW_MINUS_127_BITS, 0, exponent)
    return torch.where(torch.isnan(wanted), E8M0_NAN, exponent).to(torch.uint8)


def e8m0_reciprocal(codes: Tensor) -> Tensor:
    """What values are multiplied with to be quantised under a scale code: 2^(127 - code), NaN for 0xFF.

    Args:
        codes: uint8, any shape.

    Returns:
        fp32 of the same shape.
    """
    exponent = codes.to(torch.int32)
    value = ((E8M0_MAX - exponent) << _MANTISSA_BITS).view(torch.float32)
    value = torch.where(exponent == E8M0_MAX, _TWO_POW_MINUS_127, value)
    return torch.where(exponent == E8M0_NAN, math.nan, value)


def e8m0_to_fp32(codes: Tensor) -> Tensor:
    """The scale itself: 2^(code - 127), NaN for 0xFF.

    Args:
        codes: uint8, any shape.

    Returns:
        fp32 of the same shape.
    """
    exponent = codes.to(torch.int32)
    value = (exponent << _MANTISSA_BITS).view(torch.float32)
    value = torch.where(exponent == 0, _TWO_POW_MINUS_127, value)
    return torch.where(exponent == E8M0_NAN, math.nan, value)
