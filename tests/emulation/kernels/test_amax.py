"""Amaxes and casts of any length and alignment: what is read in several places at once, and what is left."""

from __future__ import annotations

import pytest
import torch

from nemo_fp8_recipes import numerics
from nemo_fp8_recipes.emulation.kernels import Library
from nemo_fp8_recipes.numerics import E4M3, E5M2, Fp8Format, tensorwise
from tests.numerics.inputs import DTYPES, mixed

LENGTHS = (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 255, 257, 300, 511, 513, 1025)


def placed(count: int, offset: int, dtype: torch.dtype) -> torch.Tensor:
    """Small numbers, `offset` elements into their memory."""
    generator = torch.Generator().manual_seed(count)
    return torch.rand(count + offset, generator=generator).to(dtype)[offset:]


@pytest.mark.parametrize("offset", [0, 1, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_is_found_wherever_it_is(kernels: Library, dtype: torch.dtype, offset: int) -> None:
    for count in LENGTHS:
        x = placed(count, offset, dtype)
        for place in {*range(0, count, max(1, count // 40)), count - 1}:
            before = x[place].clone()
            x[place] = -3.5
            assert kernels.amax(x) == 3.5, (count, place)
            x[place] = before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_is_passed_over_and_infinity_is_not(kernels: Library, dtype: torch.dtype) -> None:
    for count in LENGTHS[3:]:
        x = placed(count, 0, dtype)
        for place in (0, count // 3, count - 1):
            x[place] = torch.nan
            x[(place + 1) % count] = -torch.nan
            assert kernels.amax(x) == numerics.amax(x).item() <= 1.0
        x[count // 2] = -torch.inf
        assert kernels.amax(x) == torch.inf
        assert kernels.amax(x.new_full((count,), torch.nan)) == 0.0


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_beyond_the_caches_is_cast_as_a_small_one(
    kernels: Library, dtype: torch.dtype, fmt: Fp8Format, transpose: bool
) -> None:
    x = mixed((517, 523), dtype)
    codes = torch.full(x.shape, 0x55, dtype=torch.uint8)
    transposed = codes.t().contiguous() if transpose else None
    largest = kernels.cast(x, fmt, 7.0, codes, transposed, observe=True)
    expected = tensorwise.quantize(x, fmt, torch.tensor(7.0))
    assert torch.equal(codes, expected)
    assert transposed is None or torch.equal(transposed, expected.t())
    assert largest == kernels.amax(x) == numerics.amax(x).item()


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
def test_subnormal_numbers_and_nan_anywhere_among_ordinary_ones(kernels: Library, fmt: Fp8Format) -> None:
    """Codes are made 64 at a time, and made again where a few of them are not ordinary."""
    step = fmt.min_subnormal
    least = step * 2**fmt.mantissa_bits  # normal number
    small = (step / 2, step * 0.51, -step, step * 1.5, -least / 3, least * 0.99)
    for special in (*small, torch.nan, -torch.nan, torch.inf, 1e30, 0.0, -0.0):
        x = torch.rand(96, 160).add_(1.0)
        x[torch.arange(96), torch.arange(96)] = special
        codes = torch.empty(x.shape, dtype=torch.uint8)
        kernels.cast(x, fmt, 1.0, codes)
        assert torch.equal(codes, tensorwise.quantize(x, fmt, torch.tensor(1.0))), special
