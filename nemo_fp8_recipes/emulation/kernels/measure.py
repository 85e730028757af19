"""What quantisation did to a tensor: telemetry's sums, from the tensor and its codes in one pass."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.kernels.native import (
    ADDRESS,
    INT,
    LONG,
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
        part = (ADDRESS, INT, LONG, LONG, LONG)
        self._measure = self.bind("measure", None, *part, *codes, ADDRESS, LONG, LONG, ADDRESS, INT)

    def measure(self, source: Tensor, coded: Coded, first: int = 0, bulk: Tensor | None = None) -> Tensor:
        """`telemetry.elements.measure` of a tensor and the values of its codes (`probes.stored.values`), or
        of a part of it and the values of that (`probes.parts.values_between`).

        Args:
            source: what was quantised, not empty, of any shape: all elements of `coded`, or a run of them.
            first: which one of them, counted row by row, the first element of `source` is.
            bulk: as `telemetry.elements.measure` has it; not None where `source` is not all of them.

        Returns:
            fp64 (len(MEASURED),), the sums rounded less than the reference's; the same on any number of
            threads.
        """
        _, k = coded.shape
        elements = source.numel()
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
            k,
            first,
            first + elements,
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
            address(bulk),
            *bulk_sample(elements, k),
            out.data_ptr(),
            self.threads(elements),
        )
        return out
