"""What telemetry reads of block scales, for all tensors of a step at once."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.kernels.native import ADDRESS, INT, LONG, Native, address

if TYPE_CHECKING:
    from nemo_fp8_recipes.telemetry.probes.scale_codes import ScaleFormat

__all__ = ["BlockScaleKernels"]

_EXACT = 5
"""Numbers about the fp32 scales of a tensor: largest, smallest, sum, sum of squares, number."""

_STATISTICS = 8
"""Statistics of a distribution beside the percentiles."""


class BlockScaleKernels(Native):
    """Histograms of block scales and their distributions."""

    def __init__(self, loaded: ctypes.CDLL, team: int | None = None) -> None:
        super().__init__(loaded, team)
        self._scale_counts = self.bind(
            "scale_counts", None, LONG, ADDRESS, ADDRESS, ADDRESS, INT, ADDRESS, ADDRESS
        )
        arguments = (LONG, ADDRESS, LONG, INT, ADDRESS, LONG, ADDRESS, LONG, ADDRESS, ADDRESS, ADDRESS, LONG)
        self._scale_distribution = self.bind("scale_distribution", None, ADDRESS, *arguments, ADDRESS)

    def scale_counts(
        self, scales: Sequence[Tensor], grids: Tensor, slots: Tensor, operands: int
    ) -> tuple[Tensor, Tensor | None] | None:
        """What `telemetry.probes.blocks` counts; None unless all are contiguous host tensors of uint8, or of
        fp32.

        Args:
            scales: of one tensor each, all on one device.
            grids: int64 (tensors, 5), rows and columns in use and allocated, and how they are swizzled: 0 not
                at all, 1 rowwise, 2 columnwise.
            slots: int64 (tensors,), operand of each.
            operands: how many there are.

        Returns:
            int64 (operands, 256), and for fp32 scales fp64 (tensors, 5).
        """
        dtype = scales[0].dtype
        if scales[0].device.type != "cpu" or dtype not in (torch.uint8, torch.float32):
            return None
        for one in scales:
            if type(one) is not Tensor or one.dtype != dtype or not one.is_contiguous():
                return None
        number = len(scales)
        places = (ADDRESS * number)(*[one.data_ptr() for one in scales])
        counts = torch.zeros((operands, 256), dtype=torch.int64)
        fp32 = dtype == torch.float32
        exact = torch.empty((number, _EXACT), dtype=torch.float64) if fp32 else None
        self._scale_counts(
            number, places, grids.data_ptr(), slots.data_ptr(), fp32, counts.data_ptr(), address(exact)
        )
        return counts, exact

    def scale_distribution(
        self,
        counts: Tensor,
        fmt: ScaleFormat,
        *,
        blocks: Tensor,
        kept: Tensor,
        exact: Tensor | None,
        slots: Tensor,
    ) -> Tensor:
        """`telemetry.probes.scale_codes.ScaleFormat.distribution` of the operands `kept`.

        Args:
            counts: int64 (operands, 256).
            fmt: of the scales.
            blocks: fp64 (operands,), put behind the statistics.
            kept: int64 (kept,).
            exact: of fp32 scales, fp64 (tensors, 5), see `scale_counts`.
            slots: int64 (tensors,), operand of each tensor of `exact`.

        Returns:
            fp32 (statistics * kept,), one statistic after the other.
        """
        percentiles = fmt.host_percentiles
        statistics = _STATISTICS + percentiles.numel()
        out = torch.empty(statistics * kept.numel(), dtype=torch.float32)
        self._scale_distribution(
            counts.data_ptr(),
            counts.shape[0],
            fmt.host_values.data_ptr(),
            fmt.largest,
            fmt.zero_is_empty,
            percentiles.data_ptr(),
            percentiles.numel(),
            address(exact),
            slots.numel(),
            slots.data_ptr(),
            blocks.data_ptr(),
            kept.data_ptr(),
            kept.numel(),
            out.data_ptr(),
        )
        return out
