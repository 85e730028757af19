"""The largest scores of a row, with the ties and the order of the router's kernels.

Follows `naive_topk_and_mask` and `radix_topk_and_mask` in `common/fused_router/utils.h` of Transformer
Engine. A warp of 32 lanes looks at a row: lane i at columns i, i + 32, … The naive search finds one largest
score after the other; of equal ones it takes that whose lane comes first with its bits reversed, as the
halves of the warp are compared. The radix search, of 16 and more, compares bits and takes of equal ones the
first columns; it tells the columns in ascending order, those above the smallest score taken, then those equal
to it.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.binding.releases import release

__all__ = ["topk"]

_LANES = 32
_MOST_BY_RADIX = 255 * 32


def topk(scores: Tensor, count: int, *, radix_for: int, experts: int) -> Tensor:
    """Columns of the `count` largest scores of each row, int64 [rows, count], in the order of the kernel.

    Args:
        scores: fp32 [rows, columns].
        count: how many.
        radix_for: how many experts the router selects: what decides the search, of groups too.
        experts: how many there are, likewise.
    """
    threshold = int(os.environ.get("NVTE_RADIX_TOPK_THRESHOLD") or 16)
    if release().router_radix and radix_for >= threshold and experts <= _MOST_BY_RADIX:
        return _by_radix(scores, count)
    order = _preference(scores.shape[1])
    found = torch.sort(scores[:, order], dim=1, descending=True, stable=True).indices[:, :count]
    return order[found]


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
