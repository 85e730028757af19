"""What holds for every input, whatever the rule's details."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_fp8_recipes.numerics import E4M3, E5M2, Fp8Format, blockwise, mxfp8, tensorwise

both_formats = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)

BLOCKED: dict[str, tuple[Callable, Callable, tuple[int, int]]] = {
    "block 1x128": (blockwise.quantize_1d, blockwise.dequantize_1d, (1, 128)),
    "block 128x1": (blockwise.quantize_1d_columnwise, blockwise.dequantize_1d_columnwise, (128, 1)),
    "block 128x128": (blockwise.quantize_2d, blockwise.dequantize_2d, (128, 128)),
    "mxfp8 1x32": (mxfp8.quantize_rowwise, mxfp8.dequantize_rowwise, (1, 32)),
    "mxfp8 32x1": (mxfp8.quantize_columnwise, mxfp8.dequantize_columnwise, (32, 1)),
    "mxfp8 32x32": (mxfp8.quantize_2d, mxfp8.dequantize_2d, (32, 32)),
}
every_blocked = pytest.mark.parametrize("name", BLOCKED)


@st.composite
def matrices(draw: st.DrawFn, multiple_of: int = 1) -> torch.Tensor:
    """Finite fp32 or bf16 matrices spread over the binades that no rule clips."""
    rows, columns = (multiple_of * draw(st.integers(1, 300 // multiple_of)) for _ in range(2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(rows, columns, generator=generator) * 2.0 ** draw(st.integers(-60, 60))
    if draw(st.booleans()):
        x *= torch.exp2(torch.randint(-6, 7, x.shape, generator=generator).float())
    return x.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))


def largest_error(scaled_max: torch.Tensor, fmt: Fp8Format) -> torch.Tensor:
    """Half a unit in the last place of the largest value of a block: no value of it may be further off."""
    return scaled_max * 2.0 ** -(fmt.mantissa_bits + 1)


@settings(max_examples=15, deadline=None)
@given(x=matrices())
@both_formats
@every_blocked
def test_no_value_is_off_by_more_than_half_an_ulp_of_its_blocks_largest(
    name: str, fmt: Fp8Format, x: torch.Tensor
) -> None:
    quantize, dequantize, (height, width) = BLOCKED[name]
    back = dequantize(*quantize(x, fmt), fmt)
    error = (back - x.float()).abs()
    for i in range(0, x.shape[0], height if height > 1 else 37):
        for j in range(0, x.shape[1], width if width > 1 else 37):
            where = (slice(i, i + height), slice(j, j + width))
            bound = largest_error(x[where].float().abs().max(), fmt)
            assert error[where].max() <= bound * (1 + 1e-6)


@settings(max_examples=15, deadline=None)
@given(x=matrices())
@both_formats
@every_blocked
def test_quantizing_the_dequantized_again_changes_no_value(
    name: str, fmt: Fp8Format, x: torch.Tensor
) -> None:
    quantize, dequantize, _ = BLOCKED[name]
    once = dequantize(*quantize(x, fmt), fmt)
    assert torch.equal(dequantize(*quantize(once, fmt), fmt), once)


@settings(max_examples=15, deadline=None)
@given(x=matrices(), power=st.integers(-20, 20))
@both_formats
@every_blocked
def test_powers_of_two_move_into_the_scale_alone(
    name: str, fmt: Fp8Format, x: torch.Tensor, power: int
) -> None:
    quantize, dequantize, _ = BLOCKED[name]
    codes, scales = quantize(x, fmt)
    moved_codes, moved_scales = quantize(x * 2.0**power, fmt)
    assert torch.equal(moved_codes, codes)
    assert torch.equal(
        dequantize(moved_codes, moved_scales, fmt), dequantize(codes, scales, fmt) * 2.0**power
    )


@settings(max_examples=15, deadline=None)
@given(x=matrices())
@every_blocked
def test_signs_do_not_reach_the_scale(name: str, x: torch.Tensor) -> None:
    quantize = BLOCKED[name][0]
    codes, scales = quantize(x, E4M3)
    negative_codes, negative_scales = quantize(-x, E4M3)
    assert torch.equal(scales, negative_scales)
    assert torch.equal(negative_codes, codes ^ 0x80)


@settings(max_examples=15, deadline=None)
@given(x=matrices(multiple_of=128), seed=st.integers(0, 2**32))
@every_blocked
def test_blocks_do_not_see_each_other(name: str, x: torch.Tensor, seed: int) -> None:
    """Permuting blocks permutes codes and scales."""
    quantize, _, (height, width) = BLOCKED[name]
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(x.shape[0] // height, generator=generator)
    columns = torch.randperm(x.shape[1] // width, generator=generator)

    def permuted(matrix: torch.Tensor, step_rows: int, step_columns: int) -> torch.Tensor:
        row = (rows[:, None] * step_rows + torch.arange(step_rows)).flatten()
        column = (columns[:, None] * step_columns + torch.arange(step_columns)).flatten()
        return matrix[row][:, column].contiguous()

    codes, scales = quantize(x, E4M3)
    permuted_codes, permuted_scales = quantize(permuted(x, height, width), E4M3)
    assert torch.equal(permuted_codes, permuted(codes, height, width))
    assert torch.equal(permuted_scales, permuted(scales, 1, 1))


@settings(max_examples=25, deadline=None)
@given(x=matrices(), cut=st.tuples(st.integers(1, 299), st.integers(1, 299)))
@every_blocked
def test_ragged_edges_are_quantized_as_if_padded_with_zeros(
    name: str, x: torch.Tensor, cut: tuple[int, int]
) -> None:
    quantize = BLOCKED[name][0]
    ragged = x[: cut[0], : cut[1]].contiguous()
    padded = torch.zeros(-(-ragged.shape[0] // 128) * 128, -(-ragged.shape[1] // 128) * 128, dtype=x.dtype)
    padded[: ragged.shape[0], : ragged.shape[1]] = ragged
    codes, scales = quantize(ragged, E4M3)
    padded_codes, padded_scales = quantize(padded, E4M3)
    assert torch.equal(codes, padded_codes[: codes.shape[0], : codes.shape[1]])
    assert torch.equal(scales, padded_scales[: scales.shape[0], : scales.shape[1]])


@settings(max_examples=30, deadline=None)
@given(x=matrices(), factor=st.floats(1.0, 100.0))
@both_formats
@pytest.mark.parametrize("power_of_two", [False, True])
def test_tensorwise_scale_falls_as_the_amax_grows(
    fmt: Fp8Format, power_of_two: bool, x: torch.Tensor, factor: float
) -> None:
    small = tensorwise.quantize_current(x, fmt, power_of_two=power_of_two)
    large = tensorwise.quantize_current(x.float() * factor, fmt, power_of_two=power_of_two)
    assert large.scale <= small.scale
    back = tensorwise.dequantize(small.codes, small.scale_inv, fmt)
    assert (back - x.float()).abs().max() <= largest_error(small.amax, fmt) * (1 + 1e-6)
