"""Stochastic rounding: no bits to compare, but where every code must lie and how often it goes which way."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from nemo_fp8_recipes import numerics
from nemo_fp8_recipes.numerics import fp4, nvfp4

__all__ = ["judge"]

# Eight random bits: the chance to round up is the distance to the lower neighbour to within a 256th.
_GRANULARITY = 1.0 / 256.0
_BINS = 16
_SIGMAS = 6.0
_GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def judge(x: Tensor, found: Mapping[str, Tensor]) -> str:
    """What is wrong with a tensor that was quantised to NVFP4 stochastically; empty where nothing is.

    The amax and the scales must be the ones of rounding to nearest, bit for bit. Every code must be a
    neighbour of its scaled value, with its sign. In each of 16 ranges of the distance to the lower neighbour,
    codes must go up as often as the distance says, to within six standard deviations and the 256th that the
    random bits leave open.

    Args:
        x: [M, K].
        found: buffers as `expected.expected` names them.
    """
    largest = numerics.amax(x).reshape(1)
    told = []
    for direction, matrix in (("rowwise", x), ("columnwise", x.t().contiguous())):
        wrong = _direction(
            matrix,
            largest,
            found[f"{direction}_data"],
            found[f"{direction}_scale_inv"],
            found[f"amax_{direction}"],
        )
        told += [f"{direction}: {text}" for text in wrong]
    return "; ".join(told)


def _direction(matrix: Tensor, largest: Tensor, packed: Tensor, scale: Tensor, amax: Tensor) -> list[str]:
    if not torch.equal(amax.reshape(1), largest):
        return [f"amax is {amax.item()}, not {largest.item()}"]
    nearest = nvfp4.quantize_1d(matrix, largest)
    if not torch.equal(scale, nearest.scale_e4m3):
        return [f"{int((scale != nearest.scale_e4m3).sum())} scales differ from those of numerics"]
    multiplier = nvfp4.multiplier(scale, largest)
    scaled = matrix.to(torch.float32) * multiplier.repeat_interleave(nvfp4.BLOCK, dim=1)
    rounded = fp4.decode_packed(packed)

    magnitude = scaled.abs().clamp_max(fp4.E2M1_MAX)
    grid = torch.tensor(_GRID)
    below = torch.searchsorted(grid, magnitude, right=True) - 1
    lower, upper = grid[below], grid[(below + 1).clamp_max(len(_GRID) - 1)]
    went_up = rounded.abs() == upper
    neighbour = (rounded.abs() == lower) | went_up
    signed = torch.signbit(rounded) == torch.signbit(scaled)
    strays = int((~(neighbour & signed)).sum())
    if strays:
        return [f"{strays} of {rounded.numel()} codes are not neighbours of their values"]

    between = upper > lower
    distance = torch.where(between, (magnitude - lower) / (upper - lower).clamp_min(0.5), 0.0)
    return _frequencies(distance[between & (distance > 0)], went_up[between & (distance > 0)])


def _frequencies(distance: Tensor, went_up: Tensor) -> list[str]:
    """Where codes went up too often or too rarely."""
    bins = (distance * _BINS).to(torch.int64).clamp_max(_BINS - 1)
    told = []
    for number in range(_BINS):
        here = bins == number
        count = int(here.sum())
        if not count:
            continue
        wanted = float(distance[here].double().mean())
        got = float(went_up[here].double().mean())
        deviation = math.sqrt(float((distance[here] * (1 - distance[here])).double().mean()) / count)
        if abs(got - wanted) > _SIGMAS * deviation + _GRANULARITY:
            told.append(
                f"of {count} values {wanted:.3f} of a step above their lower neighbour {got:.3f} went up"
            )
    return told
