"""The random bits are those of Philox4x32-10."""

from __future__ import annotations

import torch

from nemo_fp8_recipes.numerics import fp4
from nemo_fp8_recipes.numerics.philox import random_bytes


def philox(counter: int, key: int) -> list[int]:
    """Philox4x32-10 as the paper writes it, in whole numbers."""
    words = [counter & 0xFFFFFFFF, counter >> 32, 0, 0]
    low, high = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        first, second = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = [
            second >> 32 ^ words[1] ^ low,
            second & 0xFFFFFFFF,
            first >> 32 ^ words[3] ^ high,
            first & 0xFFFFFFFF,
        ]
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return words


def test_the_first_words_are_those_that_the_authors_publish() -> None:
    """`kat_vectors` of Random123: counter and key zero."""
    found = random_bytes(torch.tensor([0]), 16).view(torch.int32).tolist()
    assert [word & 0xFFFFFFFF for word in found] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_every_counter_under_keys_with_any_bits() -> None:
    for key in (1, 2**32, 2**63 - 1, 0x9E3779B97F4A7C15, 2**64 - 1):
        signed = key - 2**64 if key >= 2**63 else key
        found = random_bytes(torch.tensor([signed]), 16 * 50).view(torch.int32).view(50, 4)
        assert [[word & 0xFFFFFFFF for word in row] for row in found.tolist()] == [
            philox(counter, key) for counter in range(50)
        ]


def test_a_part_of_the_last_counter() -> None:
    key = torch.tensor([7])
    assert torch.equal(random_bytes(key, 21), random_bytes(key, 32)[:21])


def test_a_tensor_takes_one_number_from_the_generator() -> None:
    x = torch.zeros(3, 16)
    found = [fp4.random_bits(x, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    generator = torch.Generator().manual_seed(1)
    key = fp4.random_key(torch.device("cpu"), generator)
    assert torch.equal(random_bytes(key, 48).view(3, 16), found[0])
    assert not torch.equal(fp4.random_bits(x, generator), found[0])


def test_bytes_are_spread_evenly() -> None:
    counts = torch.bincount(random_bytes(torch.tensor([3]), 1 << 20).int(), minlength=256)
    # Chi squared with 255 degrees of freedom: 5 standard deviations from its mean.
    deviation = ((counts - 4096.0) ** 2 / 4096.0).sum() - 255
    assert abs(deviation) < 5 * (2 * 255) ** 0.5
