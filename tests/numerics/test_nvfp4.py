"""NVFP4 against a scalar rule, and its stochastic rounding by distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nemo_fp8_recipes.errors import RecipeError
from nemo_fp8_recipes.numerics import fp4, hadamard, nvfp4
from nemo_fp8_recipes.numerics.scale import amax

from . import oracles
from .inputs import DTYPES, mixed

KINDS = {"1x16": (nvfp4.quantize_1d, (1, 16)), "16x16": (nvfp4.quantize_2d, (16, 16))}
every_kind = pytest.mark.parametrize("kind", KINDS)


def test_every_code_and_what_lies_next_to_every_boundary() -> None:
    values = torch.tensor(oracles.E2M1_VALUES)
    centres = torch.cat(
        [values, (values[1:] + values[:-1]) / 2, torch.tensor([7.0, 1e30, math.inf, math.nan])]
    )
    near = torch.cat(
        [centres, torch.nextafter(centres, torch.tensor(0.0)), torch.nextafter(centres, centres + 9)]
    )
    near = torch.cat([near, -near])
    expected = [oracles.encode_e2m1(value) for value in near.double().tolist()]
    assert fp4.encode(near).tolist() == expected


def test_packed_codes_decode_to_their_values() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(2, 1)
    signed = [*oracles.E2M1_VALUES, *(-value for value in oracles.E2M1_VALUES)]
    packed = fp4.pack(codes)
    assert packed.shape == (2, 8)
    assert packed[0, 1] == 0x32  # the first of two codes in the low half
    decoded = fp4.decode_packed(packed)
    assert decoded[1].tolist() == signed
    assert torch.signbit(decoded[0]).tolist() == [False] * 8 + [True] * 8


@every_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(48, 64), (33, 32), (1, 16)], ids=str)
def test_codes_and_scales_equal_the_scalar_rule(
    kind: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    quantize, block = KINDS[kind]
    x = mixed(shape, dtype, seed=sum(shape), special=False)
    x[0] = 0.0
    x[:, 1] = -0.0
    largest = amax(x)
    for factor in (1.0, 3.0):  # the amax may be another rank's
        packed, scales = quantize(x, largest * factor)
        expected, expected_scales = oracles.nvfp4(x, float(largest) * factor, block)
        np.testing.assert_array_equal(scales.numpy(), expected_scales)
        np.testing.assert_array_equal(packed.numpy(), expected)


@every_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_equal_the_scalar_rule(kind: str, dtype: torch.dtype) -> None:
    quantize, block = KINDS[kind]
    x = mixed((32, 64), dtype, seed=5)
    assert torch.isnan(x).any()
    assert torch.isinf(x).any()
    for largest in (float(amax(x)), 0.0, 1e-42, 3e38):
        packed, scales = quantize(x, torch.tensor(largest))
        expected, expected_scales = oracles.nvfp4(x, largest, block)
        np.testing.assert_array_equal(scales.numpy(), expected_scales)
        np.testing.assert_array_equal(packed.numpy(), expected)


def test_a_matrix_of_zeros_stays_zero() -> None:
    x = torch.zeros(16, 32)
    blocks = nvfp4.quantize_1d(x, amax(x))
    assert not blocks.packed.any()
    assert torch.equal(nvfp4.dequantize(*blocks, amax(x)), x)


def test_square_blocks_of_the_transposed_matrix_are_the_transposed_blocks() -> None:
    x = mixed((64, 48), torch.float32, special=False)
    (packed, scales), (packed_t, scales_t) = (nvfp4.quantize_2d(each, amax(x)) for each in (x, x.t()))
    assert torch.equal(scales.t(), scales_t)
    assert torch.equal(nvfp4.block_values(packed, scales).t(), nvfp4.block_values(packed_t, scales_t))


def test_an_amax_for_every_row_scales_every_row_as_a_tensor() -> None:
    x = mixed((24, 64), torch.float32, special=False)
    largest = amax(x, dim=1)
    packed, scales = nvfp4.quantize_1d(x, largest)
    for row in range(len(x)):
        alone = nvfp4.quantize_1d(x[row : row + 1], largest[row])
        assert torch.equal(packed[row], alone.packed[0])
        assert torch.equal(scales[row], alone.scale_e4m3[0])
    values = nvfp4.dequantize(packed, scales, largest)
    assert torch.equal(values[3], nvfp4.dequantize(packed[3:4], scales[3:4], largest[3])[0])


@every_kind
def test_dequantised_values_are_as_near_as_the_formats_allow(kind: str) -> None:
    quantize, _ = KINDS[kind]
    x = torch.randn(64, 128)
    values = nvfp4.dequantize(*quantize(x, amax(x)), amax(x))
    # Half a step of E2M1 at its top is a sixth of the block's amax, and E4M3 rounds the scale by up to 1/16.
    limit = torch.nn.functional.max_pool2d(x.abs()[None], 16, 16)[0].repeat_interleave(16, 0)
    limit = limit.repeat_interleave(16, 1) if kind == "16x16" else x.abs().max()
    assert ((values - x).abs() <= limit * (1 / 6 + 1 / 16)).all()
    assert nvfp4.dequantize(*quantize(x, amax(x)), amax(x), torch.bfloat16).dtype == torch.bfloat16


def test_products_of_block_values_times_the_gemm_scale_are_products_of_values() -> None:
    a, b = torch.randn(32, 64), torch.randn(48, 64) * 100
    (pa, sa), (pb, sb) = nvfp4.quantize_1d(a, amax(a)), nvfp4.quantize_1d(b, amax(b))
    product = (nvfp4.block_values(pa, sa) @ nvfp4.block_values(pb, sb).t()) * nvfp4.gemm_scale(
        amax(a), amax(b), 2.0
    )
    expected = 2.0 * nvfp4.dequantize(pa, sa, amax(a)) @ nvfp4.dequantize(pb, sb, amax(b)).t()
    torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_stochastic_rounding_hits_the_neighbours_with_the_right_chances() -> None:
    trials = 20000
    generator = torch.Generator().manual_seed(3)
    for value in (0.1, 0.25, 0.75, 1.9, 2.0, 2.75, 3.9, 4.5, 5.9, 6.0, 8.0, -0.4, -5.0):
        codes = fp4.encode_stochastically(torch.full((trials,), value), generator)
        drawn = fp4.decode_packed(fp4.pack(codes))
        magnitude = min(abs(value), 6.0)
        lower = max(v for v in oracles.E2M1_VALUES if v <= magnitude)
        upper = min(v for v in oracles.E2M1_VALUES if v >= magnitude)
        assert set(drawn.abs().tolist()) == {lower, upper}
        assert (torch.signbit(drawn) == (value < 0)).all()
        chance = (magnitude - lower) / (upper - lower) if upper > lower else 0.0
        share = (drawn.abs() == upper).float().mean().item() if upper > lower else 0.0
        # eight random bits quantise the chance; five standard deviations of the trials
        assert abs(share - chance) <= 1 / 256 + 5 * math.sqrt(0.25 / trials)


def test_stochastic_rounding_of_a_tensor_is_seeded_unbiased_and_leaves_the_scales() -> None:
    x = torch.randn(32, 64)
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    first, again, other = (nvfp4.quantize_1d(x, amax(x), stochastic=True, generator=seed) for seed in seeds)
    nearest = nvfp4.quantize_1d(x, amax(x))
    assert torch.equal(first.packed, again.packed)
    assert not torch.equal(first.packed, other.packed)
    assert torch.equal(first.scale_e4m3, nearest.scale_e4m3)
    generator = torch.Generator().manual_seed(7)
    draws = [nvfp4.quantize_1d(x, amax(x), stochastic=True, generator=generator) for _ in range(400)]
    mean = torch.stack([nvfp4.dequantize(*draw, amax(x)) for draw in draws]).mean(0)
    inside = x.abs() < 0.9 * torch.amax(x.abs().view(32, 4, 16), -1).repeat_interleave(16, 1)
    assert (mean - x)[inside].abs().max() < 0.12
    assert (mean - x)[inside].mean().abs() < 0.003
    assert (nvfp4.dequantize(*nearest, amax(x)) - x)[inside].abs().max() > 0.2


def test_the_hadamard_transform_keeps_lengths_and_spreads_an_outlier() -> None:
    x = torch.randn(8, 64)
    transformed = hadamard.random_hadamard_transform(x)
    torch.testing.assert_close(transformed.norm(dim=1), x.norm(dim=1))
    torch.testing.assert_close((transformed @ transformed.t()), x @ x.t(), atol=1e-4, rtol=1e-4)
    spike = torch.zeros(1, 32)
    spike[0, 3] = 4.0  # an element whose sign is changed
    assert hadamard.random_hadamard_transform(spike)[0, 0] == -1.0
    assert hadamard.random_hadamard_transform(spike, sign_mask=0)[0, 0] == 1.0
    assert (hadamard.random_hadamard_transform(spike)[0].abs() == torch.tensor([1.0] * 16 + [0.0] * 16)).all()
    assert hadamard.random_hadamard_transform(x.bfloat16()).dtype == torch.bfloat16


def test_rows_that_are_not_whole_blocks_are_refused() -> None:
    with pytest.raises(RecipeError, match="blocks of 16"):
        nvfp4.quantize_1d(torch.ones(16, 24), torch.ones(1))
    with pytest.raises(RecipeError, match="blocks of 16"):
        hadamard.random_hadamard_transform(torch.ones(16, 24))
