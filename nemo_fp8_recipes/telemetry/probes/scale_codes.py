"""The distribution of block scales, from a histogram of their codes: no sort, and one pass whatever is asked.

A block scale is one of at most 256 codes, or, where it is an fp32, has one of 256 exponents:

    E8M0 (mxfp8)      code c is 2^(c - 127); 255 is NaN
    E4M3 (nvfp4)      scales are not negative, so codes 0 to 126 in ascending order; 127 is NaN
    fp32 (blockwise)  the exponent field c: scales from 2^(c - 127) up to twice that

From the counts follow extremes, mean, root mean square, percentiles and the fraction at the format's ends:
exactly for E8M0 and E4M3, and for fp32 scales that are powers of two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nemo_fp8_recipes.telemetry.probes.index import IndexCache

__all__ = ["CODES", "E4M3_SCALES", "E8M0_SCALES", "FP32_SCALES", "PERCENTILES", "ScaleFormat", "histogram"]

CODES = 256
PERCENTILES = (1, 50, 99)

_HOSTS = ("cpu",)
"""Devices on which counting waits for nothing, as they are the host."""

_REPLICAS = 32
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

    def distribution(
        self,
        counts: Tensor,
        indices: IndexCache,
        *,
        more: Tensor,
        exact: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Statistics of the scales behind `counts`.

        Args:
            counts: int64 (operands, 256).
            more: fp64 (operands,), put behind the statistics.
            exact: (largest, smallest) and (mean, root mean square), fp64 (operands, 2) each, where they are
                known better than from the codes.

        Returns:
            fp64 (6 + len(PERCENTILES) + 2, operands): max, min, mean, rms, the percentiles, at_min, at_max,
            `more`, and the number of blocks that are not empty. Empty blocks count for at_min only; without
            any other block the rest is 0. A scale that is no number makes max, mean and rms Inf.
            Percentiles are nearest-rank: the smallest scale that at least that share of the scales does not
            exceed.
        """
        device = counts.device
        cumulative = counts.cumsum(dim=1)
        everything, lowest = cumulative[:, -1:], cumulative[:, :1]
        number = everything - lowest if self.zero_is_empty else everything
        # Ranks among the scales, from 1: the last, the first, and each percentile's, rounded up.
        factor, summand = indices.made(device, "ranks", _rank_terms)
        wanted = torch.addcmul(summand, number, factor).floor_divide_(100)
        if self.zero_is_empty:
            wanted += lowest  # behind the empty blocks, whose code is the first
        place = torch.searchsorted(cumulative, wanted).clamp_max_(CODES - 1)
        found = self._table(device, indices, "values").take(place)
        if self.zero_is_empty:
            found = torch.where(number > 0, found, 0.0)
        if exact is None:
            used = counts[:, 1:] if self.zero_is_empty else counts
            sums = used.double() @ self._table(device, indices, "moments")[CODES - used.shape[1] :]
            mean = torch.where(found[:, :1].isinf(), torch.inf, sums / number.clamp_min(1))
            mean[:, 1].sqrt_()
            ends = found[:, :2]
        else:
            ends, mean = exact
        largest = everything - cumulative[:, self.largest - 1 : self.largest]
        shares = torch.cat([lowest, largest], dim=1) / everything
        return torch.cat([ends, mean, found[:, 2:], shares, more[:, None], number.double()], dim=1).t()

    @functools.cached_property
    def host_values(self) -> Tensor:
        """`values` on the host, fp64 (256,)."""
        return torch.tensor(self.values, dtype=torch.float64, device="cpu")

    @functools.cached_property
    def host_percentiles(self) -> Tensor:
        """`PERCENTILES` on the host, int64."""
        return torch.tensor(PERCENTILES, dtype=torch.int64, device="cpu")

    def _table(self, device: torch.device, indices: IndexCache, name: str) -> Tensor:
        """What each code stands for, on the device; uploaded once. "values" is fp64 (256,), "moments" is fp64
        (256, 2): it and its square, 0 in place of Inf, as products with counts are then finite.
        """
        key = (name, self.not_finite)  # the formats with the same one have the same values
        return indices.made(device, key, lambda: self._made(name).view(np.int64)).view(torch.float64)

    def _made(self, name: str) -> np.ndarray:
        values = np.asarray(self.values)
        if name == "values":
            return values
        finite = np.where(np.isfinite(values), values, 0.0)
        return np.stack([finite, np.square(finite)], axis=1)


def _rank_terms() -> np.ndarray:
    """(factor, summand): floor((number x factor + summand) / 100) is the rank of the last, the first and each
    percentile.
    """
    factors = [100, 0, *PERCENTILES]
    return np.asarray([factors, [99, 100, *[99] * len(PERCENTILES)]], dtype=np.int64)


def histogram(
    codes: Tensor,
    segments: Sequence[int],
    slots: Sequence[int],
    size: int,
    on: Callable[[torch.device, str, Callable[[], np.ndarray]], Tensor],
) -> Tensor:
    """Counts of the codes of every operand.

    Args:
        codes: uint8 or int32 (n,), below 256, the segments one after the other.
        segments: length of each segment.
        slots: operand of each segment.
        size: operands.
        on: gives what a function returns as a tensor on the device; by name, made once for these segments.

    Returns:
        int64 (size, 256).
    """
    device = codes.device
    if device.type in _HOSTS:  # elsewhere the memory of what is kept would count, and a kernel does not
        start = on(device, "start", lambda: np.repeat(np.asarray(slots, np.int32) * CODES, segments))
        # Into the same memory in every step: the first touch of fresh pages takes as long as the sum.
        place = on(device, "place", lambda: np.empty(codes.numel(), np.int32))
        return torch.bincount(torch.add(start, codes, out=place), minlength=size * CODES).view(size, CODES)
    slot = torch.repeat_interleave(
        on(device, "slots", lambda: np.asarray(slots, np.int64)),
        on(device, "segments", lambda: np.asarray(segments, np.int64)),
        output_size=codes.numel(),
    )
    position = torch.arange(codes.numel(), device=device)
    slot = slot.mul_(_REPLICAS).add_(position.bitwise_and_(_REPLICAS - 1))
    slot = slot.mul_(CODES).add_(codes)
    counts = torch.zeros(size * _REPLICAS * CODES, dtype=torch.int32, device=device)
    counts.index_add_(0, slot, torch.ones((), dtype=torch.int32, device=device).expand(codes.numel()))
    return counts.view(size, _REPLICAS, CODES).sum(dim=1)


def _e8m0() -> tuple[float, ...]:
    return (*(2.0 ** (code - 127) for code in range(255)), np.inf)


def _e4m3() -> tuple[float, ...]:
    subnormal = [code * 2.0**-9 for code in range(8)]
    normal = [(1 + code % 8 / 8) * 2.0 ** (code // 8 - 7) for code in range(8, 127)]
    return (*subnormal, *normal, *([np.inf] * (CODES - 127)))


E8M0_SCALES = ScaleFormat(_e8m0(), not_finite=255, largest=254, zero_is_empty=True)
E4M3_SCALES = ScaleFormat(_e4m3(), not_finite=127, largest=126, zero_is_empty=True)
FP32_SCALES = ScaleFormat(_e8m0(), not_finite=255, largest=254, zero_is_empty=False)
