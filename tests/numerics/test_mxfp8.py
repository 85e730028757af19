from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nemo_fp8_recipes.numerics import E4M3, E5M2, Fp8Format, mxfp8

from . import oracles
from .inputs import DTYPES, mixed

KINDS = {
    "1x32": (mxfp8.quantize_rowwise, mxfp8.dequantize_rowwise, (1, 32)),
    "32x1": (mxfp8.quantize_columnwise, mxfp8.dequantize_columnwise, (32, 1)),
    "32x32": (mxfp8.quantize_2d, mxfp8.dequantize_2d, (32, 32)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("fmt", "shape"), [(E4M3, (64, 96)), (E5M2, (32, 128)), (E4M3, (33, 70)), (E5M2, (5, 40))], ids=str
)
def test_codes_and_scales_equal_the_scalar_rule(
    kind: str, dtype: torch.dtype, fmt: Fp8Format, shape: tuple[int, int]
) -> None:
    quantize, _, block = KINDS[kind]
    x = mixed(shape, dtype, seed=sum(shape))
    codes, scales = quantize(x, fmt)
    expected_codes, expected_scales = oracles.mxfp8(x, fmt.name, block)
    np.testing.assert_array_equal(scales.numpy(), expected_scales)
    np.testing.assert_array_equal(codes.numpy(), expected_codes)
    assert codes.is_contiguous()


@pytest.fixture(scope="module")
def torchao_rceil():
    from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx

    def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scales, codes = to_mx(x, torch.float8_e4m3fn, 32, ScaleCalculationMode.RCEIL)
        return codes.view(torch.uint8), scales.view(torch.uint8)

    return quantize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rowwise_equals_torchao(torchao_rceil, dtype: torch.dtype) -> None:
    x = mixed((256, 256), dtype, special=False)
    x[:, ::37] = 0.0
    x[7] = 0.0
    x[8] *= 2.0**-100
    # Blocks whose amax is a power of two or 448 times one, and the next bf16 numbers above these. The next
    # fp32 numbers are left to the scalar rule: on CPUs torchao takes an fp32 log2, too coarse for them.
    powers = torch.exp2(torch.arange(-30, 34).float())
    for row, factor in ((0, 1.0), (64, 448.0), (128, 1.0078125), (192, 450.0)):
        peaks = powers * factor
        x[row : row + 64, :32] = torch.rand(64, 32).to(dtype) * (peaks / 2)[:, None].to(dtype)
        x[row : row + 64, 3] = peaks.to(dtype)
    codes, scales = mxfp8.quantize_rowwise(x, E4M3)
    expected_codes, expected_scales = torchao_rceil(x)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(codes, expected_codes)


def test_columnwise_equals_torchao_on_the_transposed_matrix(torchao_rceil) -> None:
    x = mixed((128, 64), torch.bfloat16, special=False)
    codes, scales = mxfp8.quantize_columnwise(x, E4M3)
    expected_codes, expected_scales = torchao_rceil(x.t().contiguous())
    assert torch.equal(scales.t(), expected_scales)
    assert torch.equal(codes.t(), expected_codes)


def test_special_blocks() -> None:
    x = torch.ones(6, 32)
    x[0] = 0.0
    x[1] = math.nan
    x[2, 4] = math.nan
    x[3, 4] = -math.inf
    x[4] = 2.0**-149
    x[5, 0] = torch.finfo(torch.float32).max
    codes, scales = mxfp8.quantize_rowwise(x, E4M3)
    one = oracles.encode(256.0, "e4m3")  # 1 / 448 rounds up to 2^-8
    assert scales.flatten().tolist() == [0x00, 0x00, 119, 0xFE, 0x00, 247]
    assert (codes[0] == 0).all()
    assert (codes[1] == 0x7F).all()
    assert codes[2].tolist() == [one] * 4 + [0x7F] + [one] * 27
    # With an infinity the multiplier is 2^-127: the infinity saturates, everything else vanishes.
    assert codes[3].tolist() == [0x00] * 4 + [0xFE] + [0x00] * 27
    assert (codes[4] == 0x00).all()
    assert codes[5].tolist() == [oracles.encode(256.0, "e4m3")] + [0x00] * 31


@every_kind
@pytest.mark.parametrize("shape", [(0, 64), (64, 0), (0, 0)])
def test_empty_matrices(kind: str, shape: tuple[int, int]) -> None:
    quantize, dequantize, block = KINDS[kind]
    codes, scales = quantize(torch.empty(shape), E4M3)
    assert codes.shape == shape
    assert scales.shape == (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    assert dequantize(codes, scales, E4M3).shape == shape


def test_square_blocks_commute_with_the_transpose() -> None:
    x = mixed((96, 70), torch.bfloat16)
    straight, transposed = mxfp8.quantize_2d(x, E4M3), mxfp8.quantize_2d(x.t(), E4M3)
    assert torch.equal(straight.codes.t(), transposed.codes)
    assert torch.equal(straight.scale_e8m0.t(), transposed.scale_e8m0)


@every_kind
def test_dequantize_multiplies_codes_with_their_blocks_scale(kind: str) -> None:
    quantize, dequantize, block = KINDS[kind]
    x = mixed((70, 64), torch.float32, special=False)
    codes, scales = quantize(x, E5M2)
    values = dequantize(codes, scales, E5M2)
    for i, j in ((0, 0), (69, 63), (31, 32), (32, 31)):
        power = int(scales[i // block[0], j // block[1]]) - 127
        assert values[i, j].item() == math.ldexp(oracles.fp8_value(int(codes[i, j]), "e5m2"), power)
    assert torch.equal(dequantize(codes, scales, E5M2, torch.bfloat16), values.to(torch.bfloat16))


def test_a_nan_scale_dequantizes_to_nan() -> None:
    codes, scales = torch.zeros(1, 64, dtype=torch.uint8), torch.tensor([[0xFF, 0x7F]], dtype=torch.uint8)
    values = mxfp8.dequantize_rowwise(codes, scales, E4M3)
    assert torch.isnan(values[0, :32]).all()
    assert (values[0, 32:] == 0).all()


@every_kind
@pytest.mark.parametrize("shape", [(64, 32), (33, 34)])
def test_out_receives_the_codes(kind: str, shape: tuple[int, int]) -> None:
    quantize = KINDS[kind][0]
    x = mixed(shape, torch.float32)
    before = x.clone()
    buffer = torch.zeros(shape, dtype=torch.uint8)
    result = quantize(x, E4M3, out=buffer)
    assert result.codes.data_ptr() == buffer.data_ptr()
    assert torch.equal(buffer, quantize(x, E4M3).codes)
    torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)
