"""An order of codes in which one maximum over the ranks also serves minima and NaN.

An fp32 becomes the int32 of the same order, with NaN above +Inf; a minimum is stored complemented. Integers
reduce the same way in NCCL and gloo, whose floating-point maxima differ on NaN.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["ABSENT", "decode", "encode"]

ABSENT = -(2**31)
"""Code of an empty place: below that of every number."""

_NAN = 2**31 - 1


def encode(values: Tensor, minimum: Tensor) -> Tensor:
    """int32 codes of fp32 values, in the order of the values; complemented where `minimum`, so that the
    largest code is the smallest value. NaN is the largest code of both.
    """
    bits = values.view(torch.int32)
    ordered = bits ^ (bits.bitwise_right_shift(31) & 0x7FFFFFFF)
    ordered = torch.where(minimum, ~ordered, ordered)
    return torch.where(values.isnan(), _NAN, ordered)


def decode(codes: np.ndarray, minimum: np.ndarray) -> np.ndarray:
    """fp32 values of int32 codes; an empty place becomes NaN: whether it is one, its code says."""
    ordered = np.where(minimum, ~codes, codes) if minimum.any() else codes
    bits = ordered >> 31
    bits &= 0x7FFFFFFF
    bits ^= ordered
    values = bits.view(np.float32)
    # The codes of NaN and of an empty place are those of some NaN already.
    np.copyto(values, np.float32("nan"), where=np.isnan(values))
    return values
