"""Against the reference quantizer that Transformer Engine installs in Python.

Only where the reference follows the CUDA source: it differs for infinite and NaN amax and does not saturate.
"""

from __future__ import annotations

import pytest
import torch

from nemo_fp8_recipes.numerics import E4M3, E5M2, Fp8Format, amax, hadamard, nvfp4, tensorwise

from .inputs import mixed

pytestmark = pytest.mark.usefixtures("emulated")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("epsilon", [0.0, 1e-3, 1e6])
def test_current_scaling_equals_the_installed_reference(
    dtype: torch.dtype, fmt: Fp8Format, power_of_two: bool, epsilon: float
) -> None:
    from transformer_engine.pytorch.custom_recipes.reference_current_scaling import CurrentScalingQuantizerRef

    reference = CurrentScalingQuantizerRef(fmt.torch_dtype, pow_2_scales=power_of_two, eps=epsilon)
    for seed in range(3):
        x = mixed((70, 130), dtype, seed, special=False)
        expected = reference.quantize(x)
        quantized = tensorwise.quantize_current(x, fmt, epsilon=epsilon, power_of_two=power_of_two)
        assert torch.equal(quantized.codes, expected.data.view(torch.uint8))
        assert torch.equal(quantized.scale_inv, expected.scale.view(1))


def test_a_matrix_of_zeros_equals_the_installed_reference() -> None:
    from transformer_engine.pytorch.custom_recipes.reference_current_scaling import CurrentScalingQuantizerRef

    expected = CurrentScalingQuantizerRef(torch.float8_e4m3fn).quantize(torch.zeros(16, 16))
    quantized = tensorwise.quantize_current(torch.zeros(16, 16), E4M3)
    assert torch.equal(quantized.codes, expected.data.view(torch.uint8))
    assert torch.equal(quantized.scale_inv, expected.scale.view(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile", [(1, 16), (16, 16)], ids=str)
@pytest.mark.parametrize("shape", [(128, 128), (48, 80), (16, 256)], ids=str)
def test_nvfp4_equals_the_installed_reference(
    dtype: torch.dtype, tile: tuple[int, int], shape: tuple[int, int]
) -> None:
    reference = _nvfp4_reference(quant_tile_shape=tile)
    for seed in range(3):
        x = mixed(shape, dtype, seed, special=False)
        expected = reference.quantize(x)
        quantize = nvfp4.quantize_1d if tile == (1, 16) else nvfp4.quantize_2d
        for matrix, data, scale in (
            (x, expected.data, expected.scale),
            (x.t(), expected.data_t, expected.scale_t),
        ):
            packed, scales = quantize(matrix, expected.global_amax_row)
            scales = scales.repeat_interleave(tile[0], dim=0)
            assert torch.equal(packed, data)
            assert torch.equal(scales, scale.view(torch.uint8))


@pytest.mark.parametrize("signs", [True, False])
def test_the_hadamard_transform_equals_the_installed_reference(signs: bool) -> None:
    reference = _nvfp4_reference(with_rht=True, with_random_sign_mask=signs)
    for seed in range(3):
        x = mixed((64, 128), torch.bfloat16, seed, special=False)
        transformed = hadamard.random_hadamard_transform(
            x.t().contiguous(), hadamard.SIGN_MASK if signs else 0
        )
        expected = reference.quantize(x)
        assert torch.equal(amax(transformed).view(1), expected.global_amax_col)
        packed, scales = nvfp4.quantize_1d(transformed, amax(transformed))
        assert torch.equal(packed, expected.data_t)
        assert torch.equal(scales, expected.scale_t.view(torch.uint8))


def test_row_scaled_nvfp4_equals_the_installed_reference() -> None:
    reference = _nvfp4_reference(row_scaled_nvfp4=True)
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


def _nvfp4_reference(**options):
    from transformer_engine.pytorch.custom_recipes.reference_nvfp4 import NVFP4QuantizerRef
    from transformer_engine.pytorch.custom_recipes.reference_utils import Fp4Formats

    return NVFP4QuantizerRef(Fp4Formats.E2M1, **options)
