"""Slow scalar references for the quantisers, written from the rules in plain Python and numpy.

Nothing here uses torch's arithmetic or the package: fp32 operations are numpy's, rounding to FP8 searches the
table of representable values.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch

FP8_MAX = {"e4m3": 448.0, "e5m2": 57344.0}
INPUT_MAX = {
    torch.float32: float(np.finfo(np.float32).max),
    torch.bfloat16: (2.0 - 2.0**-7) * 2.0**127,
    torch.float16: 65504.0,
}
NAN_CODE = 0x7F


def fp8_value(code: int, fmt: str) -> float:
    """Value of a code, from its bit fields."""
    exponent_bits, mantissa_bits, bias = {"e4m3": (4, 3, 7), "e5m2": (5, 2, 15)}[fmt]
    sign = -1.0 if code & 0x80 else 1.0
    exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = code & ((1 << mantissa_bits) - 1)
    top = exponent == (1 << exponent_bits) - 1
    if fmt == "e4m3" and top and mantissa == 7:
        return math.nan
    if fmt == "e5m2" and top:
        return sign * math.inf if mantissa == 0 else math.nan
    if exponent == 0:
        return sign * math.ldexp(mantissa, 1 - bias - mantissa_bits)
    return sign * math.ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits)


@cache
def _positive_values(fmt: str) -> tuple[list[float], list[float]]:
    """Finite values from zero up, and the midpoints between them; doubles hold all of them exactly."""
    values = [value for code in range(0x80) if math.isfinite(value := fp8_value(code, fmt))]
    return values, [(lower + upper) / 2 for lower, upper in itertools.pairwise(values)]


def encode(value: float, fmt: str) -> int:
    """Nearest FP8 code, ties to the even code, saturating; NaN is 0x7F."""
    if math.isnan(value):
        return NAN_CODE
    sign = 0x80 if math.copysign(1.0, value) < 0 else 0
    values, midpoints = _positive_values(fmt)
    code = bisect.bisect_left(midpoints, abs(value))
    tie = code < len(midpoints) and midpoints[code] == abs(value)
    return sign | (code + 1 if tie and code % 2 else min(code, len(values) - 1))


def amax(values: np.ndarray) -> np.float32:
    """Largest magnitude, NaN ignored, zero for nothing."""
    largest = np.float32(0.0)
    for value in values.ravel():
        if abs(value) > largest:
            largest = np.float32(abs(value))
    return largest


def scale_from_amax(
    amax: np.float32, fp8_max: float, epsilon: float, power_of_two: bool, overflow_value: float
) -> np.float32:
    """The shared per-tensor and block scale."""
    if amax < np.float32(epsilon):
        amax = np.float32(epsilon)
    if math.isnan(amax) or math.isinf(amax) or amax == 0.0:
        return np.float32(1.0)
    with np.errstate(over="ignore"):
        scale = np.float32(fp8_max) / np.float32(amax)
    if math.isinf(scale):
        scale = np.float32(overflow_value)
    if power_of_two:
        _, exponent = math.frexp(float(scale))
        scale = np.float32(math.ldexp(1.0, exponent - 1))
    return scale


def e8m0(amax: np.float32, fp8_max: float) -> int:
    """Smallest exponent whose power of two is at least fp32(amax * fp32(1 / fp8_max))."""
    wanted = np.float32(amax) * np.float32(1.0 / fp8_max)
    if math.isnan(wanted):
        return 0xFF
    if math.isinf(wanted):
        return 0xFE
    if wanted == 0.0:
        return 0x00
    mantissa, exponent = math.frexp(float(wanted))
    power = exponent - 1 if mantissa == 0.5 else exponent
    return min(max(power + 127, 0), 0xFE)


def multiply(values: np.ndarray, scale: float) -> np.ndarray:
    """fp32 product."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        return values.astype(np.float32) * np.float32(scale)


def encode_all(values: np.ndarray, fmt: str) -> np.ndarray:
    return np.array([encode(float(value), fmt) for value in values.ravel()], dtype=np.uint8).reshape(
        values.shape
    )


def blockwise(
    x: torch.Tensor, fmt: str, block: tuple[int, int], epsilon: float, power_of_two: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scale_inv of FP8 block scaling."""

    def rule(largest: np.float32) -> tuple[float, np.float32]:
        scale = scale_from_amax(largest, FP8_MAX[fmt], epsilon, power_of_two, INPUT_MAX[x.dtype])
        return float(scale), np.float32(1.0) / scale

    return _by_block(x, fmt, block, rule, np.float32)


def mxfp8(x: torch.Tensor, fmt: str, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Codes and E8M0 scales of MXFP8."""

    def rule(largest: np.float32) -> tuple[float, int]:
        code = e8m0(largest, FP8_MAX[fmt])
        return math.ldexp(1.0, 127 - code), code

    return _by_block(x, fmt, block, rule, np.uint8)


def _by_block(
    x: torch.Tensor, fmt: str, block: tuple[int, int], rule: Callable, kept_dtype: type
) -> tuple[np.ndarray, np.ndarray]:
    """One block after the other; `rule` gives the multiplier and what is kept of a block's amax."""
    values = x.float().numpy()
    codes = np.zeros(values.shape, dtype=np.uint8)
    height, width = block
    rows, columns = -(-values.shape[0] // height), -(-values.shape[1] // width)
    kept = np.zeros((rows, columns), dtype=kept_dtype)
    for i in range(rows):
        for j in range(columns):
            where = np.s_[i * height : (i + 1) * height, j * width : (j + 1) * width]
            multiplier, kept[i, j] = rule(amax(values[where]))
            codes[where] = encode_all(multiply(values[where], multiplier), fmt)
    return codes, kept


E2M1_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def encode_e2m1(value: float) -> int:
    """Nearest E2M1 code, ties to the even code, saturating; NaN is +6."""
    if math.isnan(value):
        return 7
    distances = [abs(min(abs(value), 6.0) - candidate) for candidate in E2M1_VALUES]
    nearest = [code for code, distance in enumerate(distances) if distance == min(distances)]
    code = nearest[0] if len(nearest) == 1 else next(code for code in nearest if code % 2 == 0)
    return code | (8 if math.copysign(1.0, value) < 0 else 0)


def nvfp4(x: torch.Tensor, tensor_amax: float, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Packed codes and E4M3 scales of NVFP4."""
    one, largest_fp32 = np.float32(1.0), np.finfo(np.float32).max
    values = x.float().numpy()
    with np.errstate(all="ignore"):
        to_codes = min(np.float32(2688.0) / np.float32(tensor_amax), largest_fp32) if tensor_amax else one
        to_codes = one if to_codes == 0.0 else to_codes
    codes = np.zeros(values.shape, dtype=np.uint8)
    rows, columns = -(-values.shape[0] // block[0]), values.shape[1] // block[1]
    scales = np.zeros((rows, columns), dtype=np.uint8)
    for i in range(rows):
        for j in range(columns):
            where = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            with np.errstate(all="ignore"):
                wanted = amax(values[where]) * np.float32(to_codes * np.float32(1.0 / 6.0))
                scales[i, j] = encode(float(wanted), "e4m3")
                decode = np.float32(fp8_value(int(scales[i, j]), "e4m3")) * np.float32(one / to_codes)
                multiplier = min(one / decode, largest_fp32)
            scaled = multiply(values[where], multiplier)
            flat = [encode_e2m1(float(value)) for value in scaled.ravel()]
            codes[where] = np.array(flat, dtype=np.uint8).reshape(scaled.shape)
    return codes[:, ::2] | (codes[:, 1::2] << 4), scales
