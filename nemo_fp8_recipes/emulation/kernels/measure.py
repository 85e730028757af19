"""What quantisation did to a tensor: telemetry's sums, from the tensor and its codes in one pass."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.kernels.native import (
    ADDRESS,
    INT,
    LONG,
    MATRIX,
    Native,
    address,
    input_tag,
)
from nemo_fp8_recipes.telemetry.coded import Coded
from nemo_fp8_recipes.telemetry.elements import MEASURED, bulk_sample

__all__ = ["MeasureKernels"]

_FORMATS = {"e4m3": 0, "e5m2": 1, "e2m1": 2}
_FP32_SCALES, _E8M0_SCALES, _E4M3_SCALES = range(3)


class MeasureKernels(Native):
    """Kernel of telemetry's stats tier."""

    def __init__(self, loaded: ctypes.CDLL, team: int | None = None) -> None:
        super().__init__(loaded, team)
        codes = (ADDRESS, INT, ADDRESS, INT, LONG, LONG, LONG, LONG, LONG, INT, ADDRESS, INT)
        self._measure = self.bind("measure", None, *MATRIX, *codes, LONG, LONG, ADDRESS, INT)

    def measure(self, source: Tensor, coded: Coded) -> Tensor:
        """`telemetry.elements.measure` of a tensor and the values of its codes (`probes.stored.values`).

        Args:
            source: what was quantised, not empty, of any shape with as many elements as `coded`.

        Returns:
            fp64 (len(MEASURED),), the sums rounded less than the reference's; the same on any number of
            threads.
        """
        m, k = coded.shape
        x, codes = source.contiguous(), coded.codes.contiguous()
        scales, amax = coded.scales, coded.amax
        row_stride, block_stride, tiles = *scales.stride(), 0
        if coded.swizzle:
            tiles = scales.shape[1 if coded.swizzle == "rowwise" else 0] // 4
        scale_format = _FP32_SCALES
        if scales.dtype == torch.uint8:
            scale_format = _E8M0_SCALES if amax is None else _E4M3_SCALES
        out = torch.empty(len(MEASURED), dtype=torch.float64)
        self._measure(
            x.data_ptr(),
            input_tag(x),
            m,
            k,
            codes.data_ptr(),
            _FORMATS[coded.format],
            scales.data_ptr(),
            scale_format,
            *coded.block,
            row_stride,
            block_stride,
            tiles,
            coded.swizzle == "columnwise",
            address(amax),
            amax is not None and amax.numel() > 1,
            *bulk_sample(m * k, k),
            out.data_ptr(),
            self.threads(m * k),
        )
        return out
