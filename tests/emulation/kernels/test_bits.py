"""The compiled kernels give the bits of `numerics`, for every bit pattern of an input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_fp8_recipes import numerics
from nemo_fp8_recipes.emulation.kernels import Library, Quantized
from nemo_fp8_recipes.numerics import (
    E4M3,
    E5M2,
    Fp8Format,
    blockwise,
    mxfp8,
    tensorwise,
)
from tests.emulation.kernels.everything import everything
from tests.numerics.inputs import DTYPES, amaxes, mixed

FORMATS = st.sampled_from([E4M3, E5M2])
FEW = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def matrices(draw: st.DrawFn, multiple_of: int = 1, largest: int = 290) -> torch.Tensor:
    """Matrices of any bit patterns at all: random ones, values over many binades with some special ones, or
    tiny ones.
    """
    rows, columns = (multiple_of * draw(st.integers(1, largest // multiple_of)) for _ in range(2))
    dtype = draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 2**32 - 1))
    if draw(st.booleans()):
        return mixed((rows, columns), dtype, seed)
    width = np.uint32 if dtype == torch.float32 else np.uint16
    bits = np.random.default_rng(seed).integers(0, np.iinfo(width).max, (rows, columns), width, endpoint=True)
    x = torch.from_numpy(bits.view(np.int32 if width == np.uint32 else np.int16).copy()).view(dtype)
    return x if draw(st.booleans()) else x.to(torch.float32).mul(2.0**-100).to(dtype)


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal bit for bit, a NaN being as good as another."""
    if found.dtype == torch.float32:
        found, expected = found.nan_to_num(nan=9e9), expected.nan_to_num(nan=9e9)
        found, expected = found.view(torch.int32), expected.contiguous().view(torch.int32)
    return torch.equal(found, expected)


def codes_of(*shape: int) -> torch.Tensor:
    return torch.full(shape, 0x55, dtype=torch.uint8)


@FEW
@given(x=matrices(multiple_of=32), fmt=FORMATS, directions=st.sampled_from(["row", "column", "both"]))
def test_mxfp8(kernels: Library, x: torch.Tensor, fmt: Fp8Format, directions: str) -> None:
    m, k = x.shape
    rows = Quantized(codes_of(m, k), codes_of(m + 3, k // 32 + 2)) if directions != "column" else None
    columns = Quantized(codes_of(m, k), codes_of(m // 32 + 2, k + 5)) if directions != "row" else None
    kernels.mxfp8(x, fmt, rows, columns, square=False, swizzled=False)
    if rows is not None:
        codes, scales = mxfp8.quantize_rowwise(x, fmt)
        assert same(rows.codes, codes)
        assert same(rows.scales[:m, : k // 32], scales)
        back = kernels.decode_mxfp8(rows.codes, rows.scales, fmt, columnwise=False, swizzled=False)
        assert same(back, mxfp8.dequantize_rowwise(codes, scales, fmt))
    if columns is not None:
        codes, scales = mxfp8.quantize_columnwise(x, fmt)
        assert same(columns.codes, codes)
        assert same(columns.scales[: m // 32, :k], scales)
        back = kernels.decode_mxfp8(columns.codes, columns.scales, fmt, columnwise=True, swizzled=False)
        assert same(back, mxfp8.dequantize_columnwise(codes, scales, fmt))


@FEW
@given(x=matrices(multiple_of=32), fmt=FORMATS)
def test_mxfp8_in_squares(kernels: Library, x: torch.Tensor, fmt: Fp8Format) -> None:
    m, k = x.shape
    rows = Quantized(codes_of(m, k), codes_of(m, k // 32))
    columns = Quantized(codes_of(m, k), codes_of(m // 32, k))
    kernels.mxfp8(x, fmt, rows, columns, square=True, swizzled=False)
    codes, scales = mxfp8.quantize_2d(x, fmt)
    assert same(rows.codes, codes)
    assert same(columns.codes, codes)
    assert same(rows.scales, scales.repeat_interleave(32, dim=0))
    assert same(columns.scales, scales.repeat_interleave(32, dim=1))


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mxfp8_of_values_in_every_binade(
    kernels: Library, dtype: torch.dtype, fmt: Fp8Format, square: bool
) -> None:
    """Ordinary blocks, blocks of zeros, of subnormal numbers, with infinity and NaN: by themselves, side
    by side, and with values that become subnormal, or nothing, under their block's scale.
    """
    generator = torch.Generator().manual_seed(3)
    blocks = []
    for exponent in (*range(-150, 128, 9), -126, -118, -110, -95, 0, 127):
        spread = torch.randint(-24, 1, (32, 32), generator=generator)
        block = torch.randn(32, 32, generator=generator) * 2.0**spread
        blocks.append(block.mul(2.0 ** (exponent / 2)).mul(2.0 ** (exponent / 2)).to(dtype))
    ordinary = torch.randn(32, 32, generator=generator).to(dtype)
    special = [ordinary.clone() for _ in range(4)]
    special[0][5, 7], special[1][9, 3], special[2][0] = float("inf"), float("nan"), 0.0
    special[3][:] = 0.0
    blocks += [*special, *([ordinary] * 13)]
    x = torch.cat([torch.cat(blocks[i:] + blocks[:i], dim=1) for i in range(3)])
    m, k = x.shape
    rows = Quantized(codes_of(m, k), codes_of(m, k // 32))
    columns = Quantized(codes_of(m, k), codes_of(m // 32, k))
    kernels.mxfp8(x, fmt, rows, columns, square=square, swizzled=False)
    if square:
        codes, scales = mxfp8.quantize_2d(x, fmt)
        expected = (codes, scales.repeat_interleave(32, dim=0)), (codes, scales.repeat_interleave(32, dim=1))
    else:
        expected = mxfp8.quantize_rowwise(x, fmt), mxfp8.quantize_columnwise(x, fmt)
    for found, (codes, scales) in zip((rows, columns), expected, strict=True):
        assert same(found.codes, codes)
        assert same(found.scales, scales)


@pytest.mark.parametrize(("m", "k"), [(32, 32), (128, 128), (160, 416)])
def test_mxfp8_scales_in_the_gemms_order(kernels: Library, m: int, k: int) -> None:
    from nemo_fp8_recipes.emulation.binding.mxfp8 import columnwise_scale_shape, rowwise_scale_shape, swizzle

    x = mixed((m, k), torch.bfloat16)
    natural, swizzled = (
        (
            Quantized(codes_of(m, k), torch.zeros(rowwise_scale_shape(m, k), dtype=torch.uint8)),
            Quantized(codes_of(m, k), torch.zeros(columnwise_scale_shape(m, k), dtype=torch.uint8)),
        )
        for _ in range(2)
    )
    kernels.mxfp8(x, E4M3, *natural, square=False, swizzled=False)
    kernels.mxfp8(x, E4M3, *swizzled, square=False, swizzled=True)
    for columnwise, plain, gemm in zip((False, True), natural, swizzled, strict=True):
        assert same(gemm.scales, swizzle(plain.scales, columnwise=columnwise))
        back = kernels.decode_mxfp8(gemm.codes, gemm.scales, E4M3, columnwise=columnwise, swizzled=True)
        expected = kernels.decode_mxfp8(
            plain.codes, plain.scales, E4M3, columnwise=columnwise, swizzled=False
        )
        assert same(back, expected)


@FEW
@given(
    x=matrices(),
    fmt=FORMATS,
    epsilon=st.sampled_from([0.0, 1e-12, 1e-3, 100.0]),
    power_of_two=st.booleans(),
    directions=st.sampled_from(["row", "column", "both"]),
)
def test_blockwise(
    kernels: Library, x: torch.Tensor, fmt: Fp8Format, epsilon: float, power_of_two: bool, directions: str
) -> None:
    m, k = x.shape
    options = {"epsilon": epsilon, "power_of_two": power_of_two}
    rows = columns = None
    if directions != "column":
        rows = Quantized(codes_of(m, k), torch.zeros(-(-k // 128), m + 3))
    if directions != "row":
        columns = Quantized(codes_of(k, m), torch.zeros(-(-m // 128), k + 1))
    kernels.blockwise(x, fmt, rows, columns, square=False, **options)
    if rows is not None:
        codes, scales = blockwise.quantize_1d(x, fmt, **options)
        assert same(rows.codes, codes)
        assert same(rows.scales[:, :m].t().contiguous(), scales)
        back = kernels.decode_blockwise(rows.codes, rows.scales, fmt, square=False)
        assert same(back, blockwise.dequantize_1d(codes, scales, fmt))
    if columns is not None:
        codes, scales = blockwise.quantize_1d_columnwise(x, fmt, **options)
        assert same(columns.codes, codes.t())
        assert same(columns.scales[:, :k].contiguous(), scales)


@FEW
@given(x=matrices(), fmt=FORMATS, power_of_two=st.booleans())
def test_blockwise_in_squares(kernels: Library, x: torch.Tensor, fmt: Fp8Format, power_of_two: bool) -> None:
    m, k = x.shape
    down, across = -(-m // 128), -(-k // 128)
    rows = Quantized(codes_of(m, k), torch.zeros(down, across + 1))
    columns = Quantized(codes_of(k, m), torch.zeros(across, down + 2))
    kernels.blockwise(x, fmt, rows, columns, square=True, epsilon=0.0, power_of_two=power_of_two)
    codes, scales = blockwise.quantize_2d(x, fmt, power_of_two=power_of_two)
    assert same(rows.codes, codes)
    assert same(columns.codes, codes.t())
    assert same(rows.scales[:, :across].contiguous(), scales)
    assert same(columns.scales[:, :down].contiguous(), scales.t())
    back = kernels.decode_blockwise(rows.codes, rows.scales, fmt, square=True)
    assert same(back, blockwise.dequantize_2d(codes, scales, fmt))


@FEW
@given(x=matrices(), fmt=FORMATS, scale=st.floats(width=32, min_value=0.0), transpose=st.booleans())
def test_per_tensor(kernels: Library, x: torch.Tensor, fmt: Fp8Format, scale: float, transpose: bool) -> None:
    m, k = x.shape
    codes, transposed = codes_of(m, k), codes_of(k, m) if transpose else None
    largest = kernels.cast(x, fmt, scale, codes, transposed, observe=True)
    expected = tensorwise.quantize(x, fmt, torch.tensor(scale))
    assert same(codes, expected)
    assert transposed is None or same(transposed, expected.t())
    assert largest == kernels.amax(x) == numerics.amax(x).item()
    assert same(kernels.decode(codes, fmt), numerics.decode(expected, fmt))


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value_of_the_16_bit_types(kernels: Library, dtype: torch.dtype, fmt: Fp8Format) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256)
    codes = codes_of(256, 256)
    kernels.cast(x, fmt, 1.0, codes)
    assert same(codes, tensorwise.quantize(x, fmt, torch.tensor(1.0)))


SCALES = (
    1.0,
    448 / 3.1,
    0.7,
    2.0**-40,
    1.9 * 2.0**100,
    2.0**126,
    1.1 * 2.0**127,
    2.0**-126,
    1e-40,
    0.0,
    -3.0,
)


@pytest.mark.parametrize("scale", [*SCALES, float("inf"), float("nan")])
@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
def test_every_bf16_value_under_scales_of_all_kinds(kernels: Library, fmt: Fp8Format, scale: float) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    normal = becomes_normal(x, fmt, scale)
    near = torch.isin(x.view(torch.int16), torch.cat([x[normal].view(torch.int16) + by for by in (-40, 40)]))
    is_cast_right(kernels, x, normal, near, fmt, scale)


@pytest.mark.parametrize("scale", [*SCALES, 2.0**-120, 2.0**-111, 1.9 * 2.0**112, 2.0**119])
@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
def test_fp32_values_between_any_two_codes_under_scales_of_all_kinds(
    kernels: Library, fmt: Fp8Format, scale: float
) -> None:
    """Of all binades the values where another code begins and those next to them, and any bit patterns."""
    between = (np.arange(8, 16) + 0.5) / 8  # of products: in a binade of values they are of two
    significands = 2 * np.frexp(between / (abs(float(np.float32(scale))) or 1.0))[0]
    exact = np.ldexp(significands, np.arange(-130, 128)[:, None]).astype(np.float32).ravel()
    bits = exact.view(np.int32)[:, None] + np.arange(-3, 4, dtype=np.int32)
    random = np.random.default_rng(3).integers(0, 2**31, 2**15).astype(np.int32)
    magnitudes = torch.from_numpy(np.concatenate([bits.clip(0).ravel(), random])).view(torch.float32)
    x = torch.cat([magnitudes, -magnitudes])
    is_cast_right(
        kernels, x, becomes_normal(x, fmt, scale), torch.zeros(len(x), dtype=torch.bool), fmt, scale
    )


def becomes_normal(x: torch.Tensor, fmt: Fp8Format, scale: float) -> torch.Tensor:
    product = x.float().mul(scale).abs()
    return product.ge(fmt.min_subnormal * 2.0**fmt.mantissa_bits) & product.le(fmt.max)


def is_cast_right(
    kernels: Library, x: torch.Tensor, normal: torch.Tensor, near: torch.Tensor, fmt: Fp8Format, scale: float
) -> None:
    """Those that become normal numbers come first, by themselves: long runs of them take a way of their own.
    Then many with one of the others among them, those that are `near` too. Then the others.
    """
    usual, others = x[normal], x[~normal]
    x = others
    if len(usual):
        strangers = torch.cat([others[near[~normal]], others[::977]])
        among = usual.repeat(1 + 512 * len(strangers) // len(usual))
        among[torch.arange(len(strangers)) * 509] = strangers
        x = torch.cat([usual, among, others])
    x = x.view(1, -1)
    codes = codes_of(*x.shape)
    largest = kernels.cast(x, fmt, scale, codes, observe=True)
    assert same(codes, tensorwise.quantize(x, fmt, torch.tensor(scale)))
    assert largest == numerics.amax(x).item()


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
def test_every_tie_between_two_codes_and_its_neighbours(kernels: Library, fmt: Fp8Format) -> None:
    x = around_ties(fmt).reshape(1, -1)
    codes = codes_of(*x.shape)
    kernels.cast(x, fmt, 1.0, codes)
    assert same(codes, tensorwise.quantize(x, fmt, torch.tensor(1.0)))


@pytest.mark.parametrize("power", [0, -40])
@pytest.mark.parametrize("each", [1, 31])
@pytest.mark.parametrize("columns", [32, 96, 256])
@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
def test_mxfp8_of_ties_between_two_codes(
    kernels: Library, fmt: Fp8Format, columns: int, each: int, power: int
) -> None:
    """Under one scale everywhere: each block has the format's largest number. `each` values of a block's
    row are ties or next to one. Subnormal codes take a way of their own with all that are beside them. One
    block's values are all zero.
    """
    interesting, across = around_ties(fmt), columns // 32
    interesting = interesting[torch.randperm(len(interesting), generator=torch.Generator().manual_seed(1))]
    down = -(-len(interesting) // (each * 32 * across))
    blocks = interesting.repeat(20)[: down * across * 32 * each].view(-1, 32, each)
    blocks = torch.cat([blocks, torch.full((len(blocks), 32, 31 - each), 1.3)], -1)
    blocks = torch.cat([blocks, torch.full((len(blocks), 32, 1), fmt.max)], -1)
    blocks = torch.stack([row.roll(i, -1) for i, row in enumerate(blocks.unbind(1))], 1)
    x = blocks.view(down, across, 32, 32).transpose(1, 2).reshape(-1, columns)
    x = torch.cat([x, torch.zeros(32, columns)]) * 2.0**power
    m, k = x.shape
    found = Quantized(codes_of(m, k), codes_of(m, k // 32)), Quantized(codes_of(m, k), codes_of(m // 32, k))
    kernels.mxfp8(x, fmt, *found, square=False, swizzled=False)
    expected = mxfp8.quantize_rowwise(x, fmt), mxfp8.quantize_columnwise(x, fmt)
    assert expected[0][1][:-32].eq(127 + power).all()
    assert expected[1][1][:-1].eq(127 + power).all()
    for quantized, pair in zip(found, expected, strict=True):
        assert same(quantized.codes, pair[0])
        assert same(quantized.scales, pair[1])


def around_ties(fmt: Fp8Format) -> torch.Tensor:
    """The values of all codes, those in the middle between two, and the numbers next to these."""
    values = numerics.decode(torch.arange(256).to(torch.uint8), fmt)
    values = values[torch.isfinite(values)].sort().values
    ties = (values[1:] + values[:-1]) / 2
    up, down = (torch.nextafter(ties, torch.tensor(to)) for to in (float("inf"), -float("inf")))
    return torch.cat([values, ties, up, down])


def test_a_cpu_without_byte_permutations(native: Library, without_vbmi: Library) -> None:
    x = mixed((256, 288), torch.float32)
    assert everything(native, x) == everything(without_vbmi, x)
    for dtype in (torch.float32, torch.bfloat16):
        x = (mixed((64, 256), torch.float32) * 2.0**-3).to(dtype)
        for fmt in (E4M3, E5M2):
            codes = codes_of(*x.shape)
            without_vbmi.cast(x, fmt, 2.0, codes)
            assert same(codes, tensorwise.quantize(x, fmt, torch.tensor(2.0)))


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
def test_scales_at_every_boundary(kernels: Library, fmt: Fp8Format) -> None:
    largest = amaxes()
    m = len(largest) // 32 * 32
    x = torch.zeros(m, 128)
    x[:, 0] = largest[:m]
    rows = Quantized(codes_of(m, 128), codes_of(m, 4))
    kernels.mxfp8(x, fmt, rows, None, square=False, swizzled=False)
    assert same(rows.scales, mxfp8.quantize_rowwise(x, fmt).scale_e8m0)
    for power_of_two in (True, False):
        rows = Quantized(codes_of(m, 128), torch.zeros(1, m))
        kernels.blockwise(x, fmt, rows, None, square=False, epsilon=0.0, power_of_two=power_of_two)
        assert same(
            rows.scales.t().contiguous(), blockwise.quantize_1d(x, fmt, power_of_two=power_of_two).scale_inv
        )
