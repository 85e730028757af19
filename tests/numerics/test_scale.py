from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nemo_fp8_recipes.numerics import E4M3, E5M2, Fp8Format, amax, scale_from_amax
from nemo_fp8_recipes.numerics.scale import FLT_MAX, reciprocal

from . import oracles
from .inputs import DTYPES, amaxes

both_formats = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)


def bits(values: torch.Tensor) -> list[int]:
    return values.view(torch.int32).tolist()


@both_formats
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("epsilon", [0.0, 1e-12, 0.5])
@pytest.mark.parametrize("overflow_value", oracles.INPUT_MAX.values(), ids=["fp32", "bf16", "fp16"])
def test_scale_equals_the_scalar_rule(
    fmt: Fp8Format, power_of_two: bool, epsilon: float, overflow_value: float
) -> None:
    largest = amaxes()
    scale = scale_from_amax(
        largest, fmt.max, epsilon=epsilon, power_of_two=power_of_two, overflow_value=overflow_value
    )
    expected = [
        oracles.scale_from_amax(value, fmt.max, epsilon, power_of_two, overflow_value)
        for value in largest.numpy()
    ]
    np.testing.assert_array_equal(scale.numpy(), np.array(expected, dtype=np.float32))
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()


def test_scale_is_a_division_not_a_product_with_a_reciprocal() -> None:
    largest = amaxes()
    largest = largest[(largest > 1e-30) & (largest < 1e30)]
    expected = np.float32(448.0) / largest.numpy()
    np.testing.assert_array_equal(scale_from_amax(largest, 448.0).numpy(), expected)
    product = np.float32(448.0) * (np.float32(1.0) / largest.numpy())
    assert (product != expected).any(), "this sweep must tell the two apart"


@pytest.mark.parametrize("unusable", [0.0, math.inf, math.nan])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_an_unusable_amax_gives_scale_one(unusable: float, power_of_two: bool) -> None:
    assert scale_from_amax(torch.tensor([unusable]), 448.0, power_of_two=power_of_two).tolist() == [1.0]


def test_epsilon_is_a_floor_of_the_amax() -> None:
    largest = torch.tensor([0.0, 0.1, 0.25, 0.3, math.nan, math.inf])
    scale = scale_from_amax(largest, 448.0, epsilon=0.25)
    exact = (torch.tensor([448.0]) / torch.tensor([0.3])).item()
    assert scale.tolist() == [1792.0, 1792.0, 1792.0, exact, 1.0, 1.0]


def test_power_of_two_rounds_down() -> None:
    largest = torch.tensor([448.0, 447.9, 448.1, 1.0, 300.0])
    assert scale_from_amax(largest, 448.0, power_of_two=True).tolist() == [1.0, 1.0, 0.5, 256.0, 1.0]


@pytest.mark.parametrize(
    ("overflow_value", "power"),
    [(FLT_MAX, 2.0**127), (oracles.INPUT_MAX[torch.bfloat16], 2.0**127), (65504.0, 2.0**15)],
)
def test_a_scale_that_overflows_becomes_the_overflow_value(overflow_value: float, power: float) -> None:
    tiny = torch.tensor([1e-40, 1e-45])
    assert scale_from_amax(tiny, 448.0, overflow_value=overflow_value).tolist() == [overflow_value] * 2
    rounded = scale_from_amax(tiny, 448.0, overflow_value=overflow_value, power_of_two=True)
    assert rounded.tolist() == [power] * 2


def test_only_an_overflow_is_replaced_not_every_large_scale() -> None:
    # With fp16 input the overflow value is 65504, yet a finite scale above it stays.
    scale = scale_from_amax(torch.tensor([1e-6]), 448.0, overflow_value=65504.0)
    assert scale.item() == float(np.float32(448.0) / np.float32(1e-6)) > 65504.0


def test_the_amax_is_not_changed() -> None:
    largest = torch.tensor([0.0, 1.0, 1e-45, math.inf])
    before = bits(largest)
    scale_from_amax(largest, 448.0, epsilon=0.5, power_of_two=True)
    assert bits(largest) == before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_amax_ignores_nan_and_keeps_infinity(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, math.nan, -3.0], [math.nan] * 3, [0.0, -math.inf, math.nan]], dtype=dtype)
    assert amax(x).item() == math.inf
    assert amax(x[:2]).item() == 3.0
    assert amax(x, dim=1).tolist() == [3.0, 0.0, math.inf]
    assert amax(x, dim=(0, 1)).dtype == torch.float32
    assert torch.isnan(x).sum() == 5
    assert amax(torch.full((4,), math.nan, dtype=dtype)).item() == 0.0
    assert amax(torch.tensor(-2.0, dtype=dtype)).item() == 2.0


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0, 2)])
def test_amax_of_nothing_is_zero(shape: tuple[int, ...]) -> None:
    largest = amax(torch.empty(shape))
    assert largest.shape == ()
    assert largest.item() == 0.0


def test_amax_keeps_denormals() -> None:
    assert amax(torch.tensor([1e-45, -3e-45])).item() == float(np.float32(3e-45))


def test_the_inverse_scale_keeps_denormals() -> None:
    assert reciprocal(torch.tensor([FLT_MAX])).item() == float(np.float32(1.0) / np.float32(FLT_MAX)) > 0.0
    scales = scale_from_amax(amaxes(), 448.0)
    np.testing.assert_array_equal(reciprocal(scales).numpy(), np.float32(1.0) / scales.numpy())
