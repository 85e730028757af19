"""The largest scores of a row, with the ties and the order of the router's kernels.

Follows `naive_topk_and_mask` and `radix_topk_and_mask` in `common/fused_router/utils.h` of Transformer
Engine. A warp of 32 lanes looks at a row: lane i at columns i, i + 32, … The naive search finds one largest
score after the other; of equal ones it takes that whose lane comes first with its bits reversed, as the
halves of the warp are compared. No score is above NaN, and NaN is above none: it is taken only where the
search begins with it, which that of up to 8 does not since 2.17; what its lane holds beside it is not found.
When all that is left is NaN or -infinity, the first column is taken, again if it was taken before. The radix
search, of 16 and more, compares bits and takes of equal ones the first columns; it tells the columns in
ascending order, those above the smallest score taken, then those equal to it.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.binding.releases import release

__all__ = ["topk"]

_LANES = 32
_MOST_BY_RADIX = 255 * 32
_MOST_UNROLLED = 8


def topk(scores: Tensor, count: int, *, radix_for: int, experts: int) -> tuple[Tensor, Tensor]:
    """Columns of the `count` largest scores of each row, int64 [rows, count], in the order of the kernel, and
    the scores that it tells of them, fp32.

    Args:
        scores: fp32 [rows, columns].
        count: how many.
        radix_for: how many experts the router selects: what decides the search, of groups too.
        experts: how many there are, likewise.
    """
    threshold = int(os.environ.get("NVTE_RADIX_TOPK_THRESHOLD") or 16)
    if release().router_radix and radix_for >= threshold and experts <= _MOST_BY_RADIX:
        chosen = _by_radix(scores, count)
        return chosen, scores.gather(1, chosen)
    order = _preference(scores.shape[1])
    ranked = torch.sort(scores[:, order], dim=1, descending=True, stable=True)
    chosen, values = order[ranked.indices[:, :count]], ranked.values[:, :count].clone()
    odd = scores.isnan().any(dim=1) | (values[:, -1] == -math.inf)
    if odd.any():
        chosen[odd], values[odd] = _lane_by_lane(scores[odd], count)
    return chosen, values


def _lane_by_lane(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The naive search as the lanes do it, for rows with scores that cannot be ordered."""
    rows, columns = scores.shape
    turns = -(-columns // _LANES)
    lanes = torch.arange(_LANES)
    padded = scores.new_full((rows, turns * _LANES), -math.inf)
    padded[:, :columns] = scores
    skips_nan = release().router_skips_nan and count <= _MOST_UNROLLED
    chosen, values = torch.zeros(rows, count, dtype=torch.int64), scores.new_zeros(rows, count)
    for place in range(count):
        left = padded.view(rows, turns, _LANES)
        own = torch.full_like(left[:, 0], -math.inf) if skips_nan else left[:, 0]
        column = torch.where(lanes < columns, lanes, 0).expand(rows, -1)
        for turn in range(0 if skips_nan else 1, turns):
            own, column = _larger(own, column, left[:, turn], (lanes + turn * _LANES).expand(rows, -1))
        for apart in (16, 8, 4, 2, 1):
            own, column = _larger(own, column, own[:, lanes ^ apart], column[:, lanes ^ apart])
        chosen[:, place], values[:, place] = column[:, 0], own[:, 0]
        padded = padded.scatter(1, chosen[:, place : place + 1], -math.inf)
    return chosen, values


def _larger(own: Tensor, column: Tensor, other: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    above = other > own
    return torch.where(above, other, own), torch.where(above, others, column)


def _by_radix(scores: Tensor, count: int) -> Tensor:
    keys = _ordered(scores)
    ranked = torch.sort(keys, dim=1, descending=True, stable=True)
    chosen = ranked.indices[:, :count]
    smallest = ranked.values[:, count - 1 : count]
    equal = keys.gather(1, chosen) == smallest
    # Ascending columns, those equal to the smallest behind the others.
    return chosen.gather(1, torch.argsort(chosen + equal * scores.shape[1], dim=1))


def _ordered(scores: Tensor) -> Tensor:
    """int32 in the order of the scores' bits: as of the numbers, with -0 below 0 and NaN at the ends."""
    bits = scores.contiguous().view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _preference(columns: int) -> Tensor:
    """The columns, those first that win a tie."""

    def key(column: int) -> tuple[int, int]:
        lane, turn = column % _LANES, column // _LANES
        return int(f"{lane:05b}"[::-1], 2), turn

    return torch.tensor(sorted(range(columns), key=key))
