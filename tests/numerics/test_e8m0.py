from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nemo_fp8_recipes.numerics import E4M3, E5M2, Fp8Format
from nemo_fp8_recipes.numerics.e8m0 import e8m0_from_amax, e8m0_reciprocal, e8m0_to_fp32

from . import oracles
from .inputs import amaxes

ALL_CODES = torch.arange(256, dtype=torch.uint8)
UNIT = Fp8Format("unit", torch.float8_e4m3fn, 1.0, mantissa_bits=3, min_subnormal=2.0**-9)


@pytest.mark.parametrize("fmt", [E4M3, E5M2, UNIT], ids=lambda fmt: fmt.name)
def test_scale_equals_the_scalar_rule(fmt: Fp8Format) -> None:
    largest = amaxes()
    codes = e8m0_from_amax(largest, fmt)
    assert codes.dtype == torch.uint8
    assert codes.tolist() == [oracles.e8m0(value, fmt.max) for value in largest.numpy()]


def test_the_conversion_alone() -> None:
    # With fp8_max = 1 the amax is what is rounded up.
    tiny = 2.0**-127
    cases = {
        0.0: 0x00,
        1e-45: 0x00,
        tiny: 0x00,
        float(np.nextafter(np.float32(tiny), np.float32(1))): 0x01,
        2.0**-126: 0x01,
        float(np.nextafter(np.float32(2.0**-126), np.float32(1))): 0x02,
        1.0: 0x7F,
        float(np.nextafter(np.float32(1), np.float32(2))): 0x80,
        float(np.nextafter(np.float32(1), np.float32(0))): 0x7F,
        2.0**127: 0xFE,
        float(np.finfo(np.float32).max): 0xFE,
        math.inf: 0xFE,
        math.nan: 0xFF,
    }
    assert e8m0_from_amax(torch.tensor(list(cases)), UNIT).tolist() == list(cases.values())


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
def test_the_scale_rounds_up_never_down(fmt: Fp8Format) -> None:
    """The largest value of a block must fit: rounding down would saturate it."""
    largest = amaxes()
    largest = largest[torch.isfinite(largest) & (largest > 1e-30)]
    scale = e8m0_to_fp32(e8m0_from_amax(largest, fmt)).double()
    fitted = largest.double() / scale
    assert (fitted <= fmt.max * (1 + 2.0**-22)).all()
    assert (fitted > fmt.max / 2 * (1 - 2.0**-22)).all()


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
def test_the_boundary_is_the_largest_value_itself(fmt: Fp8Format) -> None:
    """fp8_max * 2^k fits 2^k exactly, although 1 / fp8_max is not an fp32 number; anything above does not."""
    for power in range(-100, 100):
        fits = np.float32(fmt.max * 2.0**power)
        largest = torch.tensor(
            [np.nextafter(fits, np.float32(0)), fits, np.nextafter(fits, np.float32(np.inf))]
        )
        assert e8m0_from_amax(largest, fmt).tolist() == [127 + power, 127 + power, 128 + power]


def test_values_of_all_codes() -> None:
    values, inverses = e8m0_to_fp32(ALL_CODES), e8m0_reciprocal(ALL_CODES)
    for code in range(255):
        assert values[code].item() == math.ldexp(1.0, code - 127)
        assert inverses[code].item() == math.ldexp(1.0, 127 - code)
    assert math.isnan(values[255])
    assert math.isnan(inverses[255])
