"""Philox4x32-10: random bits as a function of a key and a counter, the generator of GPU libraries.

J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11. Whoever knows the key can make the
bits of any part of a tensor, in any order and on any number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["random_bytes"]

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def random_bytes(key: Tensor, count: int) -> Tensor:
    """The first `count` random bytes under a key.

    The counter n, of 128 bits, makes bytes 16 n to 16 n + 15: four words, the lowest byte of each first (on
    little-endian machines).

    Args:
        key: int64 (1,), its bits; the bytes are made on its device.
        count: how many.

    Returns:
        uint8 (count,).
    """
    counter = torch.arange(-(-count // 16), device=key.device)
    zero = torch.zeros_like(counter)
    words = [counter & _WORD, counter >> 32, zero, zero]
    keys = [key & _WORD, (key >> 32) & _WORD]
    for _ in range(_ROUNDS):
        (low_0, high_0), (low_1, high_1) = (
            # Of a 64-bit product that may wrap into the sign, the bits are right.
            _halves(words[2 * pair] * multiplier)
            for pair, multiplier in enumerate(_MULTIPLIERS)
        )
        words = [high_1 ^ words[1] ^ keys[0], low_1, high_0 ^ words[3] ^ keys[1], low_0]
        keys = [(each + step) & _WORD for each, step in zip(keys, _STEPS, strict=True)]
    return torch.stack(words, dim=1).to(torch.int32).view(torch.uint8).view(-1)[:count]


def _halves(product: Tensor) -> tuple[Tensor, Tensor]:
    return product & _WORD, (product >> 32) & _WORD
