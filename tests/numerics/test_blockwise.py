from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nemo_fp8_recipes.numerics import E4M3, E5M2, Fp8Format, blockwise

from . import oracles
from .inputs import DTYPES, mixed

KINDS = {
    "1x128": (blockwise.quantize_1d, blockwise.dequantize_1d, (1, 128)),
    "128x1": (blockwise.quantize_1d_columnwise, blockwise.dequantize_1d_columnwise, (128, 1)),
    "128x128": (blockwise.quantize_2d, blockwise.dequantize_2d, (128, 128)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
both_formats = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)


@every_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("fmt", "shape", "power_of_two", "epsilon"),
    [
        (E4M3, (128, 128), True, 0.0),
        (E4M3, (130, 129), False, 0.0),
        (E5M2, (3, 200), True, 1.0),
        (E5M2, (200, 5), False, 1.0),
    ],
    ids=["full", "ragged", "short rows", "short columns"],
)
def test_codes_and_scales_equal_the_scalar_rule(
    kind: str,
    dtype: torch.dtype,
    fmt: Fp8Format,
    shape: tuple[int, int],
    power_of_two: bool,
    epsilon: float,
) -> None:
    quantize, _, block = KINDS[kind]
    x = mixed(shape, dtype, seed=hash(shape) % 100)
    codes, scale_inv = quantize(x, fmt, epsilon=epsilon, power_of_two=power_of_two)
    expected_codes, expected_scale_inv = oracles.blockwise(x, fmt.name, block, epsilon, power_of_two)
    np.testing.assert_array_equal(scale_inv.numpy(), expected_scale_inv)
    np.testing.assert_array_equal(codes.numpy(), expected_codes)
    assert codes.is_contiguous()


@every_kind
@pytest.mark.parametrize("shape", [(0, 256), (256, 0), (0, 0)])
def test_empty_matrices(kind: str, shape: tuple[int, int]) -> None:
    quantize, dequantize, block = KINDS[kind]
    codes, scale_inv = quantize(torch.empty(shape, dtype=torch.bfloat16), E4M3)
    assert codes.shape == shape
    assert scale_inv.shape == (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    assert dequantize(codes, scale_inv, E4M3).shape == shape


@pytest.mark.parametrize(
    ("dtype", "power"), [(torch.float32, 127), (torch.bfloat16, 127), (torch.float16, 15)], ids=str
)
def test_a_scale_that_overflows_becomes_the_input_dtypes_maximum(dtype: torch.dtype, power: int) -> None:
    # 57344 / 2^-24, fp16's smallest value, does not overflow: only a tiny fp32 or bf16 amax does.
    x = torch.full((1, 128), 1e-39).to(dtype)
    scale_inv = blockwise.quantize_1d(x, E5M2, power_of_two=False).scale_inv.item()
    power_of_two = blockwise.quantize_1d(x, E5M2, power_of_two=True).scale_inv.item()
    if dtype == torch.float16:
        assert scale_inv == power_of_two == 1.0  # 1e-39 is zero in fp16
    else:
        assert scale_inv == float(np.float32(1.0) / np.float32(oracles.INPUT_MAX[dtype]))
        assert power_of_two == 2.0**-power


def test_fp32_and_bf16_inputs_of_the_same_values_can_differ_only_by_the_overflow_value() -> None:
    x = torch.full((1, 128), 1e-39, dtype=torch.bfloat16)
    from_bf16 = blockwise.quantize_1d(x, E4M3, power_of_two=False).scale_inv
    from_fp32 = blockwise.quantize_1d(x.float(), E4M3, power_of_two=False).scale_inv
    assert from_bf16.item() > from_fp32.item()


def test_special_values_touch_their_own_block_only() -> None:
    x = torch.ones(2, 384)
    x[0, 5] = math.nan
    x[0, 130] = math.inf
    codes, scale_inv = blockwise.quantize_1d(x, E4M3, power_of_two=False)
    exact = float(np.float32(1.0) / np.float32(448.0))
    np.testing.assert_array_equal(scale_inv.tolist(), np.float32([[exact, 1.0, exact], [exact] * 3]))
    assert codes[0, 5].item() == 0x7F
    assert codes[0, 130].item() == oracles.encode(448.0, "e4m3")
    assert codes[0, 131].item() == oracles.encode(1.0, "e4m3")


@both_formats
def test_columnwise_is_rowwise_of_the_transposed_matrix(fmt: Fp8Format) -> None:
    x = mixed((300, 140), torch.bfloat16)
    columnwise = blockwise.quantize_1d_columnwise(x, fmt)
    rowwise = blockwise.quantize_1d(x.t().contiguous(), fmt)
    assert torch.equal(columnwise.codes.t(), rowwise.codes)
    assert torch.equal(columnwise.scale_inv.t(), rowwise.scale_inv)


@both_formats
def test_square_blocks_commute_with_the_transpose(fmt: Fp8Format) -> None:
    x = mixed((300, 140), torch.bfloat16)
    straight, transposed = blockwise.quantize_2d(x, fmt), blockwise.quantize_2d(x.t(), fmt)
    assert torch.equal(straight.codes.t(), transposed.codes)
    assert torch.equal(straight.scale_inv.t(), transposed.scale_inv)


@every_kind
def test_dequantize_multiplies_codes_with_their_blocks_scale(kind: str) -> None:
    quantize, dequantize, block = KINDS[kind]
    x = mixed((200, 150), torch.float32, special=False)
    codes, scale_inv = quantize(x, E4M3, power_of_two=False)
    values = dequantize(codes, scale_inv, E4M3).numpy()
    for i, j in ((0, 0), (199, 149), (127, 128), (128, 127), (64, 3)):
        inverse = scale_inv[i // block[0], j // block[1]].numpy()
        assert values[i, j] == np.float32(oracles.fp8_value(int(codes[i, j]), "e4m3")) * inverse
    rounded = dequantize(codes, scale_inv, E4M3, torch.bfloat16)
    assert torch.equal(rounded, torch.from_numpy(values).to(torch.bfloat16))


@every_kind
@pytest.mark.parametrize("shape", [(256, 128), (129, 130)])
def test_out_receives_the_codes(kind: str, shape: tuple[int, int]) -> None:
    quantize = KINDS[kind][0]
    x = mixed(shape, torch.bfloat16)
    before = x.clone()
    buffer = torch.zeros(shape, dtype=torch.uint8)
    result = quantize(x, E4M3, out=buffer)
    assert result.codes.data_ptr() == buffer.data_ptr()
    assert torch.equal(buffer, quantize(x, E4M3).codes)
    torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)
