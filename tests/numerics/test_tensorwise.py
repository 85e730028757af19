from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nemo_fp8_recipes.numerics import E4M3, E5M2, Fp8Format, tensorwise

from . import oracles
from .inputs import DTYPES, mixed

both_formats = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)


@both_formats
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("special", [False, True])
def test_current_scaling_equals_the_scalar_rule(
    fmt: Fp8Format, dtype: torch.dtype, power_of_two: bool, special: bool
) -> None:
    x = mixed((13, 57), dtype, special=special)
    if special:
        x = x.masked_fill(torch.isinf(x), math.nan)  # an infinity has a test of its own
    quantized = tensorwise.quantize_current(x, fmt, power_of_two=power_of_two)
    values = x.float().numpy()
    amax = oracles.amax(values)
    scale = oracles.scale_from_amax(amax, fmt.max, 0.0, power_of_two, oracles.INPUT_MAX[torch.float32])
    assert quantized.amax.tolist() == [amax]
    assert quantized.scale.tolist() == [scale]
    assert quantized.scale_inv.tolist() == [np.float32(1.0) / scale]
    expected = oracles.encode_all(oracles.multiply(values, scale), fmt.name)
    np.testing.assert_array_equal(quantized.codes.numpy(), expected)


def test_an_infinity_gives_scale_one_and_saturates() -> None:
    x = torch.tensor([math.inf, -math.inf, 1.0, 300.0, math.nan])
    quantized = tensorwise.quantize_current(x, E4M3)
    assert quantized.scale.tolist() == [1.0]
    assert quantized.amax.tolist() == [math.inf]
    assert quantized.codes.tolist() == [oracles.encode(value, "e4m3") for value in x.tolist()]


@both_formats
def test_a_tensor_of_nan_or_zero_gives_scale_one(fmt: Fp8Format) -> None:
    for value, code in ((math.nan, 0x7F), (0.0, 0x00), (-0.0, 0x80)):
        quantized = tensorwise.quantize_current(torch.full((3, 4), value), fmt)
        assert quantized.scale.tolist() == quantized.scale_inv.tolist() == [1.0]
        assert quantized.amax.tolist() == [0.0]
        assert (quantized.codes == code).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tiny_amax_gives_the_largest_fp32_scale_for_every_input_dtype(dtype: torch.dtype) -> None:
    """Per tensor the overflow value is fp32's, where block scaling takes the input dtype's."""
    x = torch.full((4,), 1e-39).to(dtype)
    quantized = tensorwise.quantize_current(x, E5M2)
    if dtype == torch.float16:
        assert quantized.scale.tolist() == [1.0]  # 1e-39 is zero in fp16
    else:
        assert quantized.scale.tolist() == [torch.finfo(torch.float32).max]


def test_epsilon_floors_the_scale_but_not_the_amax_reported() -> None:
    quantized = tensorwise.quantize_current(torch.tensor([0.125, -0.25]), E4M3, epsilon=2.0)
    assert quantized.scale.tolist() == [224.0]
    assert quantized.amax.tolist() == [0.25]


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 16), (2, 3, 4)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape)
    quantized = tensorwise.quantize_current(x, E4M3)
    assert quantized.codes.shape == x.shape
    assert quantized.scale_inv.shape == quantized.amax.shape == quantized.scale.shape == (1,)
    back = tensorwise.dequantize(quantized.codes, quantized.scale_inv, E4M3)
    assert torch.equal(back, x)


@both_formats
def test_dequantize_multiplies_in_fp32_and_rounds_once(fmt: Fp8Format) -> None:
    codes = torch.arange(0x70, dtype=torch.uint8)
    scale_inv = torch.tensor([np.float32(1) / np.float32(3)])
    exact = np.array([oracles.fp8_value(code, fmt.name) for code in range(0x70)], dtype=np.float32)
    product = exact * scale_inv.numpy()
    np.testing.assert_array_equal(tensorwise.dequantize(codes, scale_inv, fmt).numpy(), product)
    for dtype in (torch.bfloat16, torch.float16):
        values = tensorwise.dequantize(codes, scale_inv, fmt, dtype)
        assert torch.equal(values, torch.from_numpy(product).to(dtype))


def test_out_receives_the_codes() -> None:
    x = mixed((8, 8), torch.bfloat16, special=False)
    buffer = torch.zeros(8, 8, dtype=torch.uint8)
    quantized = tensorwise.quantize_current(x, E4M3, out=buffer)
    assert quantized.codes.data_ptr() == buffer.data_ptr()
    assert torch.equal(buffer, tensorwise.quantize_current(x, E4M3).codes)
