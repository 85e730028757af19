"""Against the reference quantizer that Transformer Engine installs in Python.

Only where the reference follows the CUDA source: it differs for infinite and NaN amax and does not saturate.
"""

from __future__ import annotations

import pytest
import torch

from nemo_fp8_recipes.numerics import E4M3, E5M2, Fp8Format, tensorwise

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
