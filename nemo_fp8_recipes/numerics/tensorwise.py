"""Per-tensor current scaling ("tensorwise"): the scale comes from the tensor that is quantised.

Follows Transformer Engine's `recipe/current_scaling.cu` and `cast/fp8/quantize_fp8.cuh`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nemo_fp8_recipes.numerics.cast import decode, scale_and_cast
from nemo_fp8_recipes.numerics.formats import Fp8Format
from nemo_fp8_recipes.numerics.scale import FLT_MAX, amax, reciprocal, scale_from_amax

__all__ = ["QuantizedPerTensor", "dequantize", "quantize", "quantize_current"]


class QuantizedPerTensor(NamedTuple):
    """A tensor quantised with one scale.

    Attributes:
        codes: uint8, shape of the input.
        scale_inv: fp32 (1,), 1 / scale; what the codes are multiplied with to dequantise.
        amax: fp32 (1,), largest magnitude of the input.
        scale: fp32 (1,), what the input was multiplied with.
    """

    codes: Tensor
    scale_inv: Tensor
    amax: Tensor
    scale: Tensor


def quantize(x: Tensor, fmt: Fp8Format, scale: Tensor, *, out: Tensor | None = None) -> Tensor:
    """FP8 codes of x under a given per-tensor scale.

    Args:
        x: fp32, bf16 or fp16, any shape.
        fmt: element format.
        scale: fp32, one element.
        out: uint8 of x's shape to write the codes into.

    Returns:
        uint8 codes of x's shape (`out` when given).
    """
    return scale_and_cast(x, scale.reshape(()), fmt, out=out)


def quantize_current(
    x: Tensor,
    fmt: Fp8Format,
    *,
    epsilon: float = 0.0,
    power_of_two: bool = False,
    out: Tensor | None = None,
) -> QuantizedPerTensor:
    """Quantise x with the scale of its own amax.

    Args:
        x: fp32, bf16 or fp16, any shape, empty allowed.
        fmt: element format.
        epsilon: lower bound put on the amax for the scale (the amax returned is not raised).
        power_of_two: round the scale down to a power of two.
        out: uint8 of x's shape to write the codes into.
    """
    largest = amax(x).reshape(1)
    scale = scale_from_amax(
        largest, fmt.max, epsilon=epsilon, power_of_two=power_of_two, overflow_value=FLT_MAX
    )
    return QuantizedPerTensor(quantize(x, fmt, scale, out=out), reciprocal(scale), largest, scale)


def dequantize(
    codes: Tensor, scale_inv: Tensor, fmt: Fp8Format, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The values of per-tensor codes: code * scale_inv in fp32, then rounded to `dtype`.

    Args:
        codes: uint8, any shape.
        scale_inv: fp32, one element.
        fmt: element format.
        dtype: dtype of the result.
    """
    return decode(codes, fmt).mul_(scale_inv.reshape(())).to(dtype)
