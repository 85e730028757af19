"""What quantisation does to a tensor, by numpy and ml_dtypes alone."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from nemo_fp8_recipes.telemetry.series import FP8_MAX

__all__ = ["error_statistics", "quantised"]


def quantised(x: np.ndarray, recipe: str, tensor: str, fmt: str, scale: float | None) -> np.ndarray | None:
    """The values of x's codes by numpy and ml_dtypes; for delayed scaling with its scale. None for NVFP4."""
    if recipe == "nvfp4":
        return None
    cast = ml_dtypes.float8_e4m3fn if fmt == "e4m3" else ml_dtypes.float8_e5m2
    largest = np.float32(FP8_MAX[fmt])
    if recipe in ("blockwise", "mxfp8"):
        width = 32 if recipe == "mxfp8" else 128
        height = 128 if (recipe, tensor) == ("blockwise", "weight") else 1
        amax = np.abs(x).reshape(x.shape[0] // height, height, x.shape[1] // width, width).max(axis=(1, 3))
        scale_inv = np.exp2(np.ceil(np.log2(np.where(amax > 0, amax, largest) / largest)))
        factor = 1 / np.repeat(np.repeat(scale_inv, width, axis=1), height, axis=0).astype(np.float32)
    else:
        factor = np.float32(largest / np.abs(x).max() if scale is None else scale)
    return np.clip(x * factor, -largest, largest).astype(cast).astype(np.float32) / factor


def error_statistics(pairs: list[tuple[np.ndarray, np.ndarray]], limits: list[float]) -> dict[str, Any]:
    """Statistics over all (tensor, its quantised values) of a step, the bulk by a full sort.

    Args:
        limits: the largest magnitude that the codes of each tensor stand for.
    """
    x = np.concatenate([x.reshape(-1) for x, _ in pairs]).astype(np.float64)
    error = np.concatenate([q.reshape(-1) for _, q in pairs]).astype(np.float64) - x
    bulk = np.concatenate(
        [np.abs(x) <= np.percentile(np.abs(x), 99, method="inverted_cdf") for x, _ in pairs], axis=None
    )
    return {
        "underflow": ((x != 0) & (error == -x)).mean(),
        "zeros": (x == 0).mean(),
        "saturation": np.concatenate(
            [(np.abs(x) > limit).reshape(-1) for (x, _), limit in zip(pairs, limits, strict=True)]
        ).mean(),
        "nonfinite": 0.0,
        "sqnr": pytest.approx(10 * np.log10(np.square(x).sum() / np.square(error).sum()), abs=1e-3),
        "bulk_error": pytest.approx(
            np.sqrt(np.square(error[bulk]).sum() / np.square(x[bulk]).sum()), rel=0.02
        ),
    }
