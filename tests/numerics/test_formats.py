from __future__ import annotations

import numpy as np
import pytest
import torch

from nemo_fp8_recipes.errors import RecipeError
from nemo_fp8_recipes.numerics import E4M3, E5M2, FORMATS, Fp8Format

from .oracles import FP8_MAX, fp8_value


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_limits_agree_with_the_bit_layout(fmt: Fp8Format) -> None:
    values = [fp8_value(code, fmt.name) for code in range(0x80)]
    finite = [value for value in values if np.isfinite(value)]
    assert fmt.max == max(finite) == torch.finfo(fmt.torch_dtype).max
    assert fmt.min_subnormal == min(value for value in finite if value > 0)
    one = values.index(1.0)
    assert values[one + 1] - 1.0 == 2.0**-fmt.mantissa_bits


def test_reciprocal_of_the_maximum_is_an_fp32_number() -> None:
    for fmt in (E4M3, E5M2):
        assert fmt.max_reciprocal == float(np.float32(1.0 / FP8_MAX[fmt.name]))
        assert fmt.max_reciprocal != 1.0 / FP8_MAX[fmt.name]


def test_lookup_by_name() -> None:
    assert Fp8Format.from_name("e5m2") is E5M2
    with pytest.raises(RecipeError, match=r"'e4m4'.*Allowed: e4m3, e5m2.*Did you mean e4m3") as error:
        Fp8Format.from_name("e4m4")
    assert error.value.key == "format"
