"""Quantisation computed independently of the package: numpy, ml_dtypes and torchao only."""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np
import torch

FP8 = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
FP8_MAX = {"e4m3": np.float32(448.0), "e5m2": np.float32(57344.0)}
DTYPE_MAX = {
    torch.float32: np.finfo(np.float32).max,
    torch.bfloat16: np.float32(torch.finfo(torch.bfloat16).max),
}


class Quantized(NamedTuple):
    """codes and scale_inv as arrays, and the values that they stand for."""

    codes: np.ndarray
    scale_inv: np.ndarray
    values: np.ndarray


def array(x: torch.Tensor) -> np.ndarray:
    """fp32 array of a tensor (bf16 to fp32 is exact)."""
    return x.detach().float().numpy()


def cast(scaled: np.ndarray, fmt: str) -> np.ndarray:
    """Saturating FP8 cast of fp32 values."""
    return np.clip(scaled, -FP8_MAX[fmt], FP8_MAX[fmt]).astype(FP8[fmt])


def per_tensor(x: torch.Tensor, fmt: str, scale: float | None = None, *, epsilon: float = 0.0) -> Quantized:
    """One scale; from the amax of x when none is given."""
    values = array(x)
    if scale is None:
        scale = FP8_MAX[fmt] / np.float32(max(np.abs(values).max(), np.float32(epsilon)))
    multiplier = np.float32(scale)
    codes = cast(values * multiplier, fmt)
    scale_inv = np.float32(1.0) / multiplier
    return Quantized(codes.view(np.uint8), scale_inv, codes.astype(np.float32) * scale_inv)


def blocks(x: torch.Tensor, fmt: str, block: tuple[int, int], *, power_of_two: bool = True) -> Quantized:
    """fp32 scale per block of a matrix; loops over the blocks."""
    values = array(x)
    m, k = values.shape
    rows, columns = block
    scale_inv = np.zeros((-(-m // rows), -(-k // columns)), np.float32)
    codes = np.zeros((m, k), np.uint8)
    decoded = np.zeros((m, k), np.float32)
    for i in range(scale_inv.shape[0]):
        for j in range(scale_inv.shape[1]):
            where = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            amax = np.abs(values[where]).max()
            scale = np.float32(1.0) if amax == 0 else FP8_MAX[fmt] / amax
            if power_of_two:
                scale = np.float32(2.0 ** (np.frexp(scale)[1] - 1))
            cast_block = cast(values[where] * scale, fmt)
            scale_inv[i, j] = np.float32(1.0) / scale
            codes[where] = cast_block.view(np.uint8)
            decoded[where] = cast_block.astype(np.float32) * scale_inv[i, j]
    return Quantized(codes, scale_inv, decoded)


def mx(x: torch.Tensor, fmt: str, *, columnwise: bool = False) -> Quantized:
    """MXFP8 along rows or columns with torchao's RCEIL rule; scale_inv holds E8M0 codes."""
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    source = x.detach().t().contiguous() if columnwise else x.detach().contiguous()
    dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[fmt]
    scale, data = to_mx(source, dtype, 32, ScaleCalculationMode.RCEIL)
    exponents = scale.view(torch.uint8).reshape(source.shape[0], -1).numpy()
    codes = data.view(torch.uint8).reshape(source.shape).numpy()
    decoded = codes.view(FP8[fmt]).astype(np.float32)
    decoded = decoded * np.repeat(np.exp2(exponents.astype(np.float32) - 127), 32, axis=1)
    if columnwise:
        return Quantized(codes.T, exponents.T, decoded.T)
    return Quantized(codes, exponents, decoded)
