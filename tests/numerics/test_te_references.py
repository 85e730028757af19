"""Against the reference quantizer that Transformer Engine installs in Python.

Only where the reference follows the CUDA source: it differs for infinite and NaN amax and does not saturate.
"""

from __future__ import annotations

import pytest
import torch

from nemo_fp8_recipes.numerics import E4M3, E5M2, Fp8Format, amax, hadamard, nvfp4, tensorwise
from tests.support.te_release import RELEASE, nvfp4_reference, since
from tests.support.te_release import reference as te_reference

from .inputs import mixed

pytestmark = pytest.mark.usefixtures("emulated")

DIVIDED = RELEASE == "2.11"
"""The rule for NVFP4's block scales that the installed release has."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("epsilon", [0.0, 1e-3, 1e6])
def test_current_scaling_equals_the_installed_reference(
    dtype: torch.dtype, fmt: Fp8Format, power_of_two: bool, epsilon: float
) -> None:
    reference = te_reference("current_scaling").CurrentScalingQuantizerRef(
        fmt.torch_dtype, pow_2_scales=power_of_two, eps=epsilon
    )
    for seed in range(3):
        x = mixed((70, 130), dtype, seed, special=False)
        expected = reference.quantize(x)
        quantized = tensorwise.quantize_current(x, fmt, epsilon=epsilon, power_of_two=power_of_two)
        assert torch.equal(quantized.codes, expected.data.view(torch.uint8))
        assert torch.equal(quantized.scale_inv, expected.scale.view(1))


def test_a_matrix_of_zeros_equals_the_installed_reference() -> None:
    reference = te_reference("current_scaling").CurrentScalingQuantizerRef(torch.float8_e4m3fn)
    expected = reference.quantize(torch.zeros(16, 16))
    quantized = tensorwise.quantize_current(torch.zeros(16, 16), E4M3)
    assert torch.equal(quantized.codes, expected.data.view(torch.uint8))
    assert torch.equal(quantized.scale_inv, expected.scale.view(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile", [(1, 16), (16, 16)], ids=str)
@pytest.mark.parametrize("shape", [(128, 128), (48, 80), (16, 256)], ids=str)
def test_nvfp4_equals_the_installed_reference(
    dtype: torch.dtype, tile: tuple[int, int], shape: tuple[int, int]
) -> None:
    reference = nvfp4_reference(quant_tile_shape=tile)
    for seed in range(3):
        x = mixed(shape, dtype, seed, special=False)
        expected = reference.quantize(x)
        quantize = nvfp4.quantize_1d if tile == (1, 16) else nvfp4.quantize_2d
        for matrix, data, scale in (
            (x, expected.data, expected.scale),
            (x.t(), expected.data_t, expected.scale_t),
        ):
            packed, scales = quantize(matrix, expected.global_amax_row, divided=DIVIDED)
            scales = scales.repeat_interleave(tile[0], dim=0)
            assert torch.equal(packed, data)
            assert torch.equal(scales, scale.view(torch.uint8))


@pytest.mark.parametrize("signs", [True, False])
def test_the_hadamard_transform_equals_the_installed_reference(signs: bool) -> None:
    reference = nvfp4_reference(with_rht=True, with_random_sign_mask=signs)
    for seed in range(3):
        x = mixed((64, 128), torch.bfloat16, seed, special=False)
        transformed = hadamard.random_hadamard_transform(
            x.t().contiguous(), hadamard.SIGN_MASK if signs else 0
        )
        expected = reference.quantize(x)
        assert torch.equal(amax(transformed).view(1), expected.global_amax_col)
        packed, scales = nvfp4.quantize_1d(transformed, amax(transformed), divided=DIVIDED)
        assert torch.equal(packed, expected.data_t)
        assert torch.equal(scales, expected.scale_t.view(torch.uint8))


@since("2.17")
def test_row_scaled_nvfp4_equals_the_installed_reference() -> None:
    reference = nvfp4_reference(row_scaled_nvfp4=True, columnwise=False)
    x = mixed((64, 128), torch.bfloat16, special=False)
    expected = reference.quantize(x)
    assert torch.equal(amax(x, dim=1), expected.global_amax_row)
    packed, scales = nvfp4.quantize_1d(x, amax(x, dim=1))
    assert torch.equal(packed, expected.data)
    assert torch.equal(scales, expected.scale.view(torch.uint8))


def test_the_sign_mask_is_transformer_engines() -> None:
    from transformer_engine.pytorch.tensor import nvfp4_tensor

    assert nvfp4_tensor.get_random_sign_mask_for_rht(True, 0) == hadamard.SIGN_MASK
    assert torch.equal(nvfp4_tensor.get_rht_matrix(True, 0).float(), hadamard.matrix(hadamard.SIGN_MASK))
