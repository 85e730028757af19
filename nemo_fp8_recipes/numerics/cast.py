"""Casts between fp32 and FP8 codes.

Encoding follows the hardware conversion that Transformer Engine's kernels use (`cvt.rn.satfinite`): round to
nearest even, magnitudes beyond the largest finite value (infinities too) become that value with their sign,
every NaN becomes 0x7F whatever its sign. torch's own cast does neither of the last two.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nemo_fp8_recipes.numerics.formats import E4M3, Fp8Format

__all__ = ["decode", "saturating_cast", "scale_and_cast"]


def saturating_cast(scaled: Tensor, fmt: Fp8Format, *, out: Tensor | None = None) -> Tensor:
    """FP8 codes of values that are already scaled.

    Args:
        scaled: fp32, any shape; left as it is.
        fmt: element format.
        out: uint8 of the same shape to write into; need not be contiguous.

    Returns:
        uint8 codes of the same shape (`out` when given).
    """
    return _encode_in_place(scaled.detach().clamp(-fmt.max, fmt.max), fmt, out)


def scale_and_cast(
    x: Tensor, scale: Tensor, fmt: Fp8Format, *, out: Tensor | None = None, scratch: Tensor | None = None
) -> Tensor:
    """FP8 codes of `x * scale`, multiplied in fp32.

    Args:
        x: fp32, bf16 or fp16, any shape.
        scale: fp32, broadcastable to x.
        fmt: element format.
        out: uint8 of x's shape to write into; need not be contiguous.
        scratch: fp32 of x's shape that may be overwritten, to save an allocation; x itself when x is not
            needed any more.

    Returns:
        uint8 codes of x's shape (`out` when given).
    """
    x = x.detach()
    if x.dtype == torch.float32:
        scaled = torch.mul(x, scale, out=scratch)
    else:
        scaled = x.to(torch.float32).mul_(scale)
    return _encode_in_place(scaled.clamp_(-fmt.max, fmt.max), fmt, out)


def decode(codes: Tensor, fmt: Fp8Format) -> Tensor:
    """The fp32 values of FP8 codes, exactly.

    Args:
        codes: uint8, any shape.
        fmt: element format.

    Returns:
        fp32 of the same shape. NaN codes give NaN, E5M2's 0x7C and 0xFC give infinities.
    """
    if fmt != E4M3:
        return codes.view(fmt.torch_dtype).to(torch.float32)
    # torch's own E4M3 conversion is ten times slower on CPUs. An E4M3 code shifted left by seven bits is the
    # fp16 number 2^-8 times as large (exponent biases 7 and 15), subnormals included. Only NaN needs care:
    # magnitude 0x7F is the one that carries into bit 7 when one is added, and that carry completes fp16's
    # exponent of a NaN.
    wide = codes.to(torch.int16)
    magnitude = wide & 0x7F
    carry = (magnitude + 1).bitwise_and_(0x80)
    half = wide.bitwise_and_(0x80).bitwise_left_shift_(1).bitwise_or_(magnitude).bitwise_or_(carry)
    return half.bitwise_left_shift_(7).view(torch.float16).to(torch.float32).mul_(256.0)


def _encode_in_place(clamped: Tensor, fmt: Fp8Format, out: Tensor | None) -> Tensor:
    """Codes of clamped fp32 values; overwrites `clamped`."""
    # torch keeps the sign of a NaN, the hardware conversion does not.
    clamped.nan_to_num_(nan=math.nan)
    if out is None:
        return clamped.to(fmt.torch_dtype).view(torch.uint8)
    out.view(fmt.torch_dtype).copy_(clamped)
    return out
