"""The distribution of block scales, from a histogram of their codes: no sort, and one pass whatever is asked.

A block scale is one of at most 256 codes, or, where it is an fp32, has one of 256 exponents:

    E8M0 (mxfp8)      code c is 2^(c - 127); 255 is NaN
    E4M3 (nvfp4)      scales are not negative, so codes 0 to 126 in ascending order; 127 is NaN
    fp32 (blockwise)  the exponent field c: scales from 2^(c - 127) up to twice that

From the counts follow extremes, mean, root mean square, percentiles and the fraction at the format's ends:
exactly for E8M0 and E4M3, and for fp32 scales that are powers of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nemo_fp8_recipes.telemetry.probes.index import IndexCache

__all__ = ["CODES", "E4M3_SCALES", "E8M0_SCALES", "FP32_SCALES", "PERCENTILES", "ScaleFormat", "histogram"]

CODES = 256
PERCENTILES = (1, 50, 99)

_REPLICAS = {"cpu": 1}
_REPLICAS_ELSEWHERE = 32
"""Copies of the histogram on a GPU: neighbouring threads, whose scales are alike, add to different ones."""


@dataclass(frozen=True)
class ScaleFormat:
    """How block scales are stored.

    Attributes:
        values: fp64 (256,), what each code stands for, ascending; Inf from `not_finite` on.
        not_finite: the first code that is no number.
        largest: code of the largest scale.
        zero_is_empty: whether code 0 says that the block has nothing to scale (zeros, or below the format).
    """

    values: tuple[float, ...]
    not_finite: int
    largest: int
    zero_is_empty: bool

    def table(self, device: torch.device, indices: IndexCache) -> Tensor:
        """`values` on the device, uploaded once; 0 in place of Inf: products with counts are then finite."""
        finite = np.asarray(self.values)
        finite = np.where(np.isfinite(finite), finite, 0.0)
        return indices.on(device, finite.view(np.int64)).view(torch.float64)

    def distribution(self, counts: Tensor, indices: IndexCache) -> dict[str, Tensor]:
        """Statistics of the scales behind `counts`.

        Args:
            counts: int64 (operands, 256).

        Returns:
            fp64 (operands,) each: max, min, mean, rms, one p<percentile> per percentile, at_min and at_max.
            Empty blocks count for at_min only; without any other block the rest is 0. A scale that is no
            number makes max, mean and rms Inf. Percentiles are nearest-rank: the smallest scale that at least
            that share of the scales does not exceed.
        """
        device = counts.device
        values = self.table(device, indices)
        used = counts[:, 1:] if self.zero_is_empty else counts
        values = values[CODES - used.shape[1] :]
        number = used.sum(dim=1)
        cumulative = used.cumsum(dim=1)
        weights = used.to(torch.float64)
        sums = weights @ torch.stack([values, values.square()], dim=1)
        # Ranks among the scales, from 1: the first, the last, and each percentile's, rounded up.
        ranks = (number[:, None] * indices.on(device, PERCENTILES) + 99).div(100, rounding_mode="floor")
        wanted = torch.cat([torch.ones_like(number)[:, None], number[:, None], ranks], dim=1)
        place = (cumulative[:, None, :] < wanted[:, :, None]).sum(dim=2).clamp_max(used.shape[1] - 1)
        found = values[place]
        infinite = place >= self.not_finite - (CODES - used.shape[1])
        found = torch.where(infinite, torch.inf, found)
        some = number > 0
        found = torch.where(some[:, None], found, 0.0)
        mean_and_square = torch.where(some[:, None], sums / number[:, None], 0.0)
        mean_and_square = torch.where(infinite[:, 1:2], torch.inf, mean_and_square)
        everything = counts.sum(dim=1)
        ends = torch.stack([counts[:, 0], counts[:, self.largest :].sum(dim=1)], dim=1) / everything[:, None]
        return {
            "max": found[:, 1],
            "min": found[:, 0],
            "mean": mean_and_square[:, 0],
            "rms": mean_and_square[:, 1].sqrt(),
            **{f"p{percentile:02d}": found[:, 2 + i] for i, percentile in enumerate(PERCENTILES)},
            "at_min": ends[:, 0],
            "at_max": ends[:, 1],
        }


def histogram(
    codes: Tensor, segments: Sequence[int], slots: Sequence[int], size: int, indices: IndexCache
) -> Tensor:
    """Counts of the codes of every operand.

    Args:
        codes: int32 (n,), below 256, the segments one after the other.
        segments: length of each segment.
        slots: operand of each segment.
        size: operands.

    Returns:
        int64 (size, 256).
    """
    device = codes.device
    replicas = _REPLICAS.get(device.type, _REPLICAS_ELSEWHERE)
    if device.type == "cpu":  # elsewhere the memory of what is kept would count, and a kernel does not
        key = ("histogram", tuple(slots), tuple(segments))
        start = indices.made(device, key, lambda: np.repeat(np.asarray(slots, np.int64) * CODES, segments))
        slot = start + codes
    else:
        slot = torch.repeat_interleave(
            indices.on(device, slots), indices.on(device, segments), output_size=codes.numel()
        )
        position = torch.arange(codes.numel(), device=device)
        slot = slot.mul_(replicas).add_(position.bitwise_and_(replicas - 1))
        slot = slot.mul_(CODES).add_(codes)
    counts = torch.zeros(size * replicas * CODES, dtype=torch.int32, device=device)
    counts.index_add_(0, slot, torch.ones((), dtype=torch.int32, device=device).expand(codes.numel()))
    return counts.view(size, replicas, CODES).sum(dim=1)


def _e8m0() -> tuple[float, ...]:
    return (*(2.0 ** (code - 127) for code in range(255)), np.inf)


def _e4m3() -> tuple[float, ...]:
    subnormal = [code * 2.0**-9 for code in range(8)]
    normal = [(1 + code % 8 / 8) * 2.0 ** (code // 8 - 7) for code in range(8, 127)]
    return (*subnormal, *normal, *([np.inf] * (CODES - 127)))


E8M0_SCALES = ScaleFormat(_e8m0(), not_finite=255, largest=254, zero_is_empty=True)
E4M3_SCALES = ScaleFormat(_e4m3(), not_finite=127, largest=126, zero_is_empty=True)
FP32_SCALES = ScaleFormat(_e8m0(), not_finite=255, largest=254, zero_is_empty=False)
