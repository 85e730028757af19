from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from nemo_fp8_recipes.numerics import E4M3, E5M2, Fp8Format, decode, saturating_cast
from nemo_fp8_recipes.numerics.cast import scale_and_cast

from .oracles import encode, encode_all, fp8_value, multiply

ML_DTYPE = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
ALL_CODES = torch.arange(256, dtype=torch.uint8)
both_formats = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)


def every_16_bit_value(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@both_formats
def test_decode_gives_the_value_of_all_256_codes(fmt: Fp8Format) -> None:
    values = decode(ALL_CODES, fmt)
    assert values.dtype == torch.float32
    expected = np.array([fp8_value(code, fmt.name) for code in range(256)], dtype=np.float32)
    np.testing.assert_array_equal(values.numpy(), expected)
    np.testing.assert_array_equal(np.signbit(values.numpy())[:0x7F], np.signbit(expected)[:0x7F])
    np.testing.assert_array_equal(
        values.numpy(), ALL_CODES.numpy().view(ML_DTYPE[fmt.name]).astype(np.float32)
    )


@both_formats
def test_decode_keeps_the_sign_of_zero_and_the_codes(fmt: Fp8Format) -> None:
    codes = ALL_CODES.clone()
    assert math.copysign(1.0, decode(codes, fmt)[0x80].item()) == -1.0
    assert torch.equal(codes, ALL_CODES)


@both_formats
def test_decode_takes_any_shape_and_layout(fmt: Fp8Format) -> None:
    grid = ALL_CODES.view(16, 16)
    for codes in (grid.t(), grid[:, ::3], grid[:0], grid[3, 5]):
        values = decode(codes, fmt)
        assert values.shape == codes.shape
        np.testing.assert_array_equal(values.numpy(), decode(ALL_CODES, fmt)[codes.long()].numpy())


@both_formats
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_encode_of_every_16_bit_value(fmt: Fp8Format, dtype: torch.dtype) -> None:
    values = every_16_bit_value(dtype).float()
    clipped = np.clip(values.numpy(), -fmt.max, fmt.max)
    numbers = ~np.isnan(clipped)
    expected = np.full(clipped.shape, 0x7F, dtype=np.uint8)
    expected[numbers] = clipped[numbers].astype(ML_DTYPE[fmt.name]).view(np.uint8)
    np.testing.assert_array_equal(saturating_cast(values, fmt).numpy(), expected)


@both_formats
def test_encode_of_spread_fp32_values(fmt: Fp8Format) -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(200_000, generator=generator)
    values *= torch.exp2(torch.randint(-24, 20, values.shape, generator=generator).float())
    expected = np.clip(values.numpy(), -fmt.max, fmt.max).astype(ML_DTYPE[fmt.name]).view(np.uint8)
    np.testing.assert_array_equal(saturating_cast(values, fmt).numpy(), expected)


@both_formats
def test_ties_go_to_the_even_code_and_neighbours_of_ties_do_not(fmt: Fp8Format) -> None:
    values = np.array([fp8_value(code, fmt.name) for code in range(0x80)])
    values = values[np.isfinite(values)]
    ties = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    lower = np.arange(len(ties))
    sign = np.array([[0], [0x80]])
    for points, expected in (
        (ties, lower + lower % 2),
        (np.nextafter(ties, np.float32(np.inf)), lower + 1),
        (np.nextafter(ties, np.float32(0)), lower),
    ):
        codes = saturating_cast(torch.from_numpy(np.stack([points, -points])), fmt).numpy()
        np.testing.assert_array_equal(codes, expected | sign)


@both_formats
def test_codes_survive_decoding_and_encoding(fmt: Fp8Format) -> None:
    values = decode(ALL_CODES, fmt)
    codes = saturating_cast(values, fmt)
    finite = torch.isfinite(values)
    assert torch.equal(codes[finite], ALL_CODES[finite])
    assert (codes[torch.isnan(values)] == 0x7F).all()


@both_formats
def test_saturation_and_nan(fmt: Fp8Format) -> None:
    top = encode(fmt.max, fmt.name)
    negative_nan = torch.tensor([0x7FC00000 - 2**31], dtype=torch.int32).view(torch.float32).item()
    cases = {
        math.inf: top,
        -math.inf: top | 0x80,
        3.4e38: top,
        -3.4e38: top | 0x80,
        float(np.nextafter(np.float32(fmt.max), np.float32(np.inf))): top,
        math.nan: 0x7F,
    }
    assert saturating_cast(torch.tensor(list(cases)), fmt).tolist() == list(cases.values())
    assert math.copysign(1.0, negative_nan) == -1.0
    assert saturating_cast(torch.tensor([negative_nan]), fmt).tolist() == [0x7F]


@both_formats
def test_underflow(fmt: Fp8Format) -> None:
    half = fmt.min_subnormal / 2
    values = torch.tensor([half, -half, np.nextafter(np.float32(half), np.float32(1)), 0.0, -0.0, 1e-45])
    assert saturating_cast(values, fmt).tolist() == [0x00, 0x80, 0x01, 0x00, 0x80, 0x00]


def test_the_product_is_fp32_whatever_the_input_dtype() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x = every_16_bit_value(dtype)
        x = x[torch.isfinite(x)][::7]
        scale = torch.tensor([1.0625001])
        expected = encode_all(multiply(x.float().numpy(), 1.0625001), "e4m3")
        np.testing.assert_array_equal(scale_and_cast(x, scale, E4M3).numpy(), expected)
        rounded = saturating_cast((x * scale.to(dtype)).float(), E4M3).numpy()
        assert (rounded != expected).any(), "this sweep must tell the two products apart"


def test_values_are_multiplied_by_the_scale_not_divided_by_its_inverse() -> None:
    # Beside a tie of x * scale, dividing by the rounded inverse can fall to its other side.
    scale = np.float32(448.0) / np.float32(0.7)
    values = np.array([fp8_value(code, "e4m3") for code in range(0x7F)], dtype=np.float32)
    near_ties = ((values[1:] + values[:-1]) / 2) / scale
    x = np.concatenate(
        [near_ties, np.nextafter(near_ties, np.float32(1)), np.nextafter(near_ties, np.float32(0))]
    )
    expected = encode_all(x * scale, "e4m3")
    codes = scale_and_cast(torch.from_numpy(x), torch.tensor([scale]), E4M3)
    np.testing.assert_array_equal(codes.numpy(), expected)
    divided = encode_all(x / (np.float32(1.0) / scale), "e4m3")
    assert (divided != expected).any(), "these inputs must tell the two apart"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_are_left_alone_and_need_no_gradient(dtype: torch.dtype) -> None:
    x = torch.tensor([1.0, math.nan, math.inf, -500.0], dtype=dtype, requires_grad=True)
    before = x.detach().clone()
    codes = scale_and_cast(x, torch.tensor(2.0), E4M3)
    assert not codes.requires_grad
    scaled = torch.tensor([1.0, math.nan, math.inf])
    saturating_cast(scaled, E4M3)
    torch.testing.assert_close(x.detach(), before, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(
        scaled, torch.tensor([1.0, math.nan, math.inf]), rtol=0, atol=0, equal_nan=True
    )


def test_out_is_written_in_place_through_any_strides() -> None:
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    expected = scale_and_cast(x, torch.tensor(3.0), E4M3)
    for buffer in (torch.zeros(6, 10, dtype=torch.uint8), torch.zeros(10, 6, dtype=torch.uint8).t()):
        result = scale_and_cast(x, torch.tensor(3.0), E4M3, out=buffer)
        assert result.data_ptr() == buffer.data_ptr()
        assert torch.equal(buffer, expected)
    padded = torch.full((6, 12), 9, dtype=torch.uint8)
    saturating_cast(x * 3.0, E4M3, out=padded[:, :10])
    assert torch.equal(padded[:, :10], expected)
    assert (padded[:, 10:] == 9).all()
