"""What quantisation did to the elements of a tensor: the sums that all its statistics follow from.

Sums, not ratios: added over micro-batches and averaged over ranks they give the ratio of all elements
together, whatever share each part had.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import torch
from torch import Tensor

__all__ = ["MEASURED", "bulk_sample", "measure", "spare_rows"]

MEASURED: tuple[tuple[str, Literal["sum", "max"]], ...] = (
    ("elements", "sum"),
    ("zero_elements", "sum"),
    ("underflows", "sum"),
    ("saturated", "sum"),
    ("nonfinite", "sum"),
    ("norm", "sum"),
    ("noise", "sum"),
    ("bulk_norm", "sum"),
    ("bulk_noise", "sum"),
    ("largest", "max"),
)
"""What `measure` gives, in order, and how the parts of a tensor are put together. The norms are squared."""

_BULK = 0.99
"""Share of the elements that count for the bulk: all but the largest."""

_SAMPLE = 1 << 15
"""Elements from which the bulk's limit is estimated; 1 % is then 1 % +- 0.06 % (standard deviation)."""

_ROUNDING = 1 + 2.0**-20
"""What rounding of scale and inverse scale may add to the largest magnitude without clipping it."""


def measure(
    source: Tensor,
    values: Tensor,
    limit: Tensor,
    bulk: Tensor | None = None,
    *,
    used: Tensor | None = None,
) -> Tensor:
    """Compare a tensor with its quantised self. Waits for nothing; about 50 kernels.

    Elements that are NaN or Inf count as `elements` and `nonfinite` and nowhere else.

    Args:
        source: what was quantised, any floating dtype, (rows, columns), not empty.
        values: fp32 of the same shape: the values that its codes stand for.
        limit: fp32, broadcastable to it: the largest magnitude that a code can stand for.
        bulk: fp32, one element: the magnitude that elements of the bulk do not exceed, which is known from
            elsewhere where `source` is a part of the tensor. None: that of all but its largest 1 %.
        used: int64, one element: how many rows, from the first one on, count; of none everything is 0. None:
            all of them do.

    Returns:
        fp64 (len(MEASURED),): number of elements, of zeros, of elements that are not zero and became zero, of
        elements above the limit, of elements that are NaN or Inf; squared norms of the tensor and of its
        error, and both over the bulk; largest magnitude.
    """
    with torch.no_grad():
        x = source.detach().to(torch.float32, copy=True)
        if used is not None:
            spare = spare_rows(x, used)  # as if they were zeros that stay zeros
            x.masked_fill_(spare, 0.0)
            values, limit = values.masked_fill(spare, 0.0), limit.masked_fill(spare, 0.0)
        unknown = x - x  # NaN where x is NaN or Inf, else 0
        values = values.add(unknown).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        x.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        magnitude = x.abs()
        largest = magnitude.amax()
        counts = [x, values, magnitude > limit * _ROUNDING, unknown]
        nonzero, kept, saturated, nonfinite = torch.stack([part.count_nonzero() for part in counts])
        error = values.sub_(x)
        whole, units = _norms(x, error, unknown, largest)
        small = magnitude.le_(bulk if bulk is not None else _bulk_limit(magnitude, used))  # 1 and 0
        bulks, bulk_units = _norms(x.mul_(small), error.mul_(small), unknown)
        norms = torch.stack([*whole, *bulks]).to(torch.float64)
        squares = norms.mul_(torch.cat([units, bulk_units])).square_()
        number = torch.full_like(nonzero, x.numel()) if used is None else used * x.shape[-1]
        counted = [number, number - nonzero - nonfinite, nonzero - kept, saturated, nonfinite]
        return torch.cat([torch.stack(counted), squares, largest[None]])


def _norms(
    x: Tensor, error: Tensor, scratch: Tensor, largest: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """Norms of a tensor and of its error.

    Squares of what is scaled to at most 1 neither overflow nor, where they matter, underflow. The bulk needs
    scales of its own: an element of the whole may be so far above it that nothing of it would be left.

    Args:
        x, error: fp32 of one shape, finite.
        scratch: like them; is overwritten.
        largest: fp32, the largest magnitude of `x` where it is known.

    Returns:
        Both, scaled, fp32, one element each; and what to multiply them with, fp32 (2,).
    """
    ends_of_x = (largest, largest) if largest is not None else torch.aminmax(x)
    ends = torch.stack([*ends_of_x, *torch.aminmax(error)])
    units = ends.view(2, 2).abs().amax(dim=1).clamp_min_(torch.finfo(torch.float32).tiny)
    scaled = [
        torch.linalg.vector_norm(torch.div(part, units[index], out=scratch))
        for index, part in enumerate((x, error))
    ]
    return scaled, units


def spare_rows(matrix: Tensor, used: Tensor) -> Tensor:
    """Whether each row of `matrix` (rows, columns) lies behind the first `used`; bool (rows, 1)."""
    return (torch.arange(matrix.shape[0], device=matrix.device) >= used)[:, None]


def _bulk_limit(magnitude: Tensor, used: Tensor | None) -> Tensor:
    """Magnitude that all but the largest 1 % of the elements do not exceed; fp32, one element.

    Of more than `_SAMPLE` elements it is that of an even sample.
    """
    stride, top = bulk_sample(magnitude.numel(), magnitude.shape[-1])
    sample = magnitude.reshape(-1)[::stride]
    if used is None:
        return sample.topk(top, sorted=False).values.amin()
    # Of the others, which are zeros, none is larger.
    number = (used * magnitude.shape[-1] + (stride - 1)).div(stride, rounding_mode="floor")
    place = number - number.to(torch.float64).mul_(_BULK).ceil_().to(torch.int64)
    return sample.topk(top).values.gather(0, place.reshape(1)).squeeze()


@functools.lru_cache(maxsize=256)
def bulk_sample(elements: int, columns: int) -> tuple[int, int]:
    """Which elements of a matrix, counted row by row, decide what its bulk is.

    Returns:
        Every how manieth is looked at: a number that has no factor in common with the row length, so that
        every column is visited alike. And which of those, counted from the largest magnitude, the bulk does
        not exceed.
    """
    stride = max(1, elements // _SAMPLE)
    while math.gcd(stride, columns) > 1:
        stride += 1
    sample = -(-elements // stride)
    return stride, sample - math.ceil(_BULK * sample) + 1
