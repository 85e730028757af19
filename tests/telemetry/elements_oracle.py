"""What quantisation did to a matrix of which the codes are known, by numpy and ml_dtypes alone.

`scales` are fp32 everywhere: what the codes of each block are multiplied with.
"""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from nemo_fp8_recipes.telemetry.coded import Coded

__all__ = ["bulk_limit", "measured", "values"]

_E2M1 = np.asarray([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_LARGEST = {"e4m3": 448.0, "e5m2": 57344.0, "e2m1": 6.0}
_KINDS = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


def _plain(coded: Coded) -> np.ndarray:
    """The values of the codes without their scales, fp32 (rows, columns)."""
    codes = coded.codes.numpy()
    if coded.format == "e2m1":
        return np.stack([_E2M1[codes & 15], _E2M1[codes >> 4]], axis=-1).reshape(len(codes), -1)
    return np.ascontiguousarray(codes).view(_KINDS[coded.format]).astype(np.float32)


def _per_element(coded: Coded, scales: np.ndarray) -> np.ndarray:
    """The scale of each element, fp32 (rows, columns)."""
    rows, columns = coded.shape
    return scales.repeat(coded.block[0], axis=0).repeat(coded.block[1], axis=1)[:rows, :columns]


def values(coded: Coded, scales: np.ndarray) -> np.ndarray:
    """What the codes stand for, fp32 (rows, columns)."""
    with np.errstate(all="ignore"):
        found: np.ndarray = _plain(coded) * _per_element(coded, scales)
    return found


def bulk_limit(coded: Coded, scales: np.ndarray) -> np.float32:
    """The 99th percentile of an even sample of elements that lie anywhere in what is rounded to their codes:
    at the fractional part of a multiple of the golden section.
    """
    plain = np.abs(_plain(coded)).astype(np.float64)
    if coded.format == "e2m1":
        steps = np.abs(_E2M1[:8]).astype(np.float64)
    else:
        every = np.arange(128, dtype=np.uint8).view(_KINDS[coded.format]).astype(np.float64)
        steps = every[np.isfinite(every)]
    midpoints = np.concatenate([[0.0], (steps[1:] + steps[:-1]) / 2, [1.5 * steps[-1] - 0.5 * steps[-2]]])
    stride = _stride(plain.shape)
    sample, scale = plain.reshape(-1)[::stride], _per_element(coded, scales).reshape(-1)[::stride]
    known = np.isfinite(sample)
    index = np.searchsorted(steps, np.where(known, sample, 0.0))
    lower, upper = (np.where(known, edges[index], 0.0) for edges in (midpoints[:-1], midpoints[1:]))
    spread = (np.arange(sample.size) * 40503 % 65536 / 65536).astype(np.float32)
    with np.errstate(all="ignore"):
        magnitudes = ((upper - lower).astype(np.float32) * spread + lower.astype(np.float32)) * scale
    return _percentile(np.where(np.isfinite(magnitudes), magnitudes, 0.0))


def _stride(shape: tuple[int, ...]) -> int:
    """Every how manieth element of a matrix is in an even sample of it."""
    rows, columns = shape
    stride = max(1, rows * columns // 32768)
    while math.gcd(stride, columns) > 1:
        stride += 1
    return stride


def _percentile(magnitudes: np.ndarray) -> np.float32:
    """The 99th percentile."""
    return np.float32(np.sort(magnitudes)[math.ceil(0.99 * magnitudes.size) - 1])


def measured(
    source: Tensor, coded: Coded, scales: np.ndarray, bulk: np.float32 | None = None, first: int = 0
) -> dict[str, float]:
    """Counts and sums by their names in `elements.MEASURED`.

    Args:
        source: all elements of the matrix, or a run of them.
        bulk: magnitude that those of the bulk do not exceed; None: it follows from all elements.
        first: which element of the matrix the first one of `source` is.
    """
    x = source.to(torch.float32).numpy().reshape(-1)
    run = slice(first, first + x.size)
    value = values(coded, scales).reshape(-1)[run]
    with np.errstate(all="ignore"):
        limit = _per_element(coded, scales) * np.float32(_LARGEST[coded.format]) * np.float32(1 + 2**-20)
    known = np.isfinite(x)
    x, value = np.where(known, x, 0), np.where(known & np.isfinite(value), value, 0)
    magnitude = np.abs(x)
    small = magnitude <= (_percentile(magnitude[:: _stride(coded.shape)]) if bulk is None else bulk)
    exact = x.astype(np.float64)
    error = value.astype(np.float64) - exact
    return {
        "elements": x.size,
        "zero_elements": int((known & (x == 0)).sum()),
        "underflows": int((x != 0).sum()) - int((value != 0).sum()),
        "saturated": int((magnitude > limit.reshape(-1)[run]).sum()),
        "nonfinite": int((~known).sum()),
        "norm": float(np.square(exact).sum()),
        "noise": float(np.square(error).sum()),
        "bulk_norm": float(np.square(exact[small]).sum()),
        "bulk_noise": float(np.square(error[small]).sum()),
        "largest": float(magnitude.max()),
    }
