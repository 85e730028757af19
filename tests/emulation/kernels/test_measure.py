"""The kernel of telemetry's stats tier: against numpy in fp64, and against its form in torch operations."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemo_fp8_recipes.emulation.kernels import Library
from nemo_fp8_recipes.numerics import FORMATS, amax, blockwise, mxfp8, nvfp4, tensorwise
from nemo_fp8_recipes.telemetry.coded import Coded
from nemo_fp8_recipes.telemetry.elements import MEASURED, measure
from nemo_fp8_recipes.telemetry.probes.blocks import unpadded_positions
from nemo_fp8_recipes.telemetry.probes.index import IndexCache
from nemo_fp8_recipes.telemetry.probes.stored import values
from tests.numerics.inputs import DTYPES, mixed
from tests.telemetry.elements_oracle import bulk_limit, measured

COUNTS = ("elements", "zero_elements", "underflows", "saturated", "nonfinite", "largest")
SUMS = ("norm", "noise", "bulk_norm", "bulk_noise")
BLOCKS = {
    "tensor": None,
    "rows of 128": (1, 128),
    "columns of 128": (128, 1),
    "squares": (128, 128),
    "mxfp8 rowwise": (1, 32),
    "mxfp8 columnwise": (32, 1),
    "nvfp4": (1, 16),
}
FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def named(found: Tensor) -> dict[str, float]:
    return dict(zip((name for name, _ in MEASURED), found.tolist(), strict=True))


def as_torch(source: Tensor, coded: Coded) -> dict[str, float]:
    found = values(coded, IndexCache())
    return named(measure(source.reshape(found.values.shape), found.values, found.limit))


def check(kernels: Library, source: Tensor, coded: Coded, scales: np.ndarray) -> None:
    found, expected = named(kernels.measure(source, coded)), measured(source, coded, scales)
    assert {name: found[name] for name in COUNTS} == {name: expected[name] for name in COUNTS}
    for name in SUMS:  # only the order of summation differs
        assert found[name] == pytest.approx(expected[name], rel=1e-12, abs=0), name
    by_torch = as_torch(source, coded)
    assert {name: found[name] for name in COUNTS} == {name: by_torch[name] for name in COUNTS}


def fp32_scales(coded: Coded) -> np.ndarray:
    """By ml_dtypes; for scales in the order of the blocks."""
    scales = coded.scales.numpy()
    if coded.amax is not None:
        plain = np.ascontiguousarray(scales).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        with np.errstate(over="ignore"):
            return plain * coded.amax.numpy().reshape(-1, 1) * np.float32(1 / 2688)
    if scales.dtype == np.uint8:
        return np.ascontiguousarray(scales).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    return scales


def swizzled(coded: Coded, swizzle: str) -> Coded:
    """The same with its uint8 scales in the GEMM's order, padded."""
    down, across = coded.scales.shape
    padding = (128, 4) if swizzle == "rowwise" else (4, 128)
    allocated = tuple(-(-size // to) * to for size, to in zip((down, across), padding, strict=True))
    scales = torch.full(allocated, 0x77, dtype=torch.uint8)
    positions = unpadded_positions(down, across, *allocated, swizzle)
    scales.view(-1)[torch.from_numpy(positions.copy())] = coded.scales.reshape(-1)
    return coded._replace(scales=scales, swizzle=swizzle)


def quantised(x: Tensor, kind: str, fmt: str) -> Coded:
    """x as each recipe quantises it."""
    block = BLOCKS[kind]
    known = torch.where(x.isfinite(), x, 0.0)
    if block is None:
        codes, scales, *_ = tensorwise.quantize_current(known, FORMATS[fmt])
        return Coded(codes, scales.reshape(1, 1), fmt, (x.shape[0], x.shape[1]))
    if kind == "nvfp4":
        largest = amax(known).reshape(1)
        return Coded(*nvfp4.quantize_1d(x, largest), "e2m1", block, amax=largest)
    quantise = {
        "rows of 128": blockwise.quantize_1d,
        "columns of 128": blockwise.quantize_1d_columnwise,
        "squares": blockwise.quantize_2d,
        "mxfp8 rowwise": mxfp8.quantize_rowwise,
        "mxfp8 columnwise": mxfp8.quantize_columnwise,
    }[kind]
    return Coded(*quantise(x, FORMATS[fmt]), fmt, block)


def anything(shape: tuple[int, int], kind: str, fmt: str, seed: int) -> Coded:
    """Codes and scales of any bits, which no quantiser made: NaN, infinite, at the ends of their formats."""
    random = np.random.default_rng(seed)
    rows, columns = shape
    block = BLOCKS[kind] or shape
    blocks = (-(-rows // block[0]), -(-columns // block[1]))

    def some(of: tuple[int, ...], below: int = 256) -> Tensor:
        return torch.from_numpy(random.integers(0, below, of, np.uint8))

    if kind == "nvfp4":
        largest = torch.from_numpy(random.standard_normal(rows if seed % 2 else 1).astype(np.float32)).abs()
        return Coded(some((rows, columns // 2)), some(blocks, 128), "e2m1", block, amax=largest)
    if kind.startswith("mxfp8"):
        return Coded(some(shape), some(blocks), fmt, block)
    bits = random.integers(0, 0x7F900000, blocks, np.int32)
    return Coded(some(shape), torch.from_numpy(bits).view(torch.float32), fmt, block)


def any_bits(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> Tensor:
    width = np.int32 if dtype == torch.float32 else np.int16
    info = np.iinfo(width)
    bits = np.random.default_rng(seed).integers(info.min, info.max, shape, width, endpoint=True)
    return torch.from_numpy(bits).view(dtype)


SEEDS = st.integers(0, 2**32 - 1)
KINDS = st.sampled_from(sorted(BLOCKS))


@FEW
@given(
    shape=st.tuples(st.integers(1, 290), st.integers(1, 290)),
    dtype=st.sampled_from(DTYPES),
    kind=KINDS,
    fmt=st.sampled_from(sorted(FORMATS)),
    related=st.booleans(),
    seed=SEEDS,
)
@example((1, 1), torch.float32, "tensor", "e4m3", True, 0)
@example((1, 1), torch.bfloat16, "squares", "e5m2", False, 1)
@example((129, 3), torch.float16, "columns of 128", "e4m3", True, 2)
def test_every_layout_of_any_values(
    kernels: Library,
    shape: tuple[int, int],
    dtype: torch.dtype,
    kind: str,
    fmt: str,
    related: bool,
    seed: int,
) -> None:
    if kind == "nvfp4":
        shape = (shape[0], -(-shape[1] // 16) * 16)
    x = mixed(shape, dtype, seed) if seed % 3 else any_bits(shape, dtype, seed)
    coded = quantised(x, kind, fmt) if related else anything(shape, kind, fmt, seed)
    check(kernels, x, coded, fp32_scales(coded))


@FEW
@given(
    shape=st.tuples(st.integers(1, 290), st.integers(1, 290)),
    wide=st.booleans(),
    kind=KINDS,
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=SEEDS,
)
def test_a_part_of_a_matrix(
    kernels: Library, shape: tuple[int, int], wide: bool, kind: str, ends: tuple[float, float], seed: int
) -> None:
    """That begins and ends anywhere, in the middle of rows and blocks too."""
    if wide:
        shape = (shape[0] // 30 + 1, 8 * shape[1])
    if kind == "nvfp4":
        shape = (shape[0], -(-shape[1] // 16) * 16)
    x = mixed(shape, DTYPES[seed % len(DTYPES)], seed)
    coded = quantised(x, kind, "e4m3")
    scales = fp32_scales(coded)
    first, last = sorted(int(end * (x.numel() - 1)) for end in ends)
    source, bulk = x.reshape(-1)[first : last + 1], bulk_limit(coded, scales)
    found = named(kernels.measure(source, coded, first, torch.tensor(bulk)))
    expected = measured(source, coded, scales, bulk, first)
    assert {name: found[name] for name in COUNTS} == {name: expected[name] for name in COUNTS}
    for name in SUMS:
        assert found[name] == pytest.approx(expected[name], rel=1e-12, abs=0), name


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("shape", [(300, 1024), (2050, 48), (5, 17008), (1, 70016)])
def test_tensors_of_which_a_sample_gives_the_bulk(
    kernels: Library, kind: str, shape: tuple[int, int]
) -> None:
    x = mixed(shape, torch.float32, seed=len(kind))
    coded = quantised(x, kind, "e4m3")
    check(kernels, x, coded, fp32_scales(coded))


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("value", [0.0, 1.0, -3e38, 1e-45, math.nan, math.inf])
def test_tensors_of_one_value(kernels: Library, kind: str, value: float) -> None:
    x = torch.full((130, 64), value)
    coded = quantised(x, kind, "e4m3")
    check(kernels, x, coded, fp32_scales(coded))


def test_the_largest_lie_together(kernels: Library) -> None:
    """What a few elements say of the bulk's limit is wrong then; the limit is not."""
    ascending = torch.arange(1, 200 * 256 + 1, dtype=torch.float32)
    for values_in_order in (ascending, ascending.flip(0)):
        x = values_in_order.reshape(200, 256)
        check(kernels, x, coded := quantised(x, "tensor", "e4m3"), fp32_scales(coded))
    x = torch.zeros(256, 256)
    x[::64, ::3] = 5.0
    check(kernels, x, coded := quantised(x, "tensor", "e4m3"), fp32_scales(coded))


@pytest.mark.parametrize("shape", [(128, 128), (160, 416)])
@pytest.mark.parametrize(
    ("kind", "swizzle"),
    [
        (k, s)
        for k, s in [("mxfp8 rowwise", "rowwise"), ("mxfp8 columnwise", "columnwise"), ("nvfp4", "rowwise")]
    ],
)
def test_scales_in_the_gemms_order(kernels: Library, shape: tuple[int, int], kind: str, swizzle: str) -> None:
    x = mixed(shape, torch.bfloat16)
    plain = quantised(x, kind, "e4m3")
    found = kernels.measure(x, swizzled(plain, swizzle))
    assert found.tolist() == kernels.measure(x, plain).tolist()


def test_padded_and_transposed_scales_and_codes(kernels: Library) -> None:
    x = mixed((200, 300), torch.float32)
    plain = quantised(x, "rows of 128", "e4m3")
    padded = torch.full((plain.scales.shape[1] + 1, 208), math.nan)
    padded[: plain.scales.shape[1], :200] = plain.scales.t()
    stored = plain._replace(
        scales=padded[: plain.scales.shape[1], :200].t(), codes=plain.codes.t().contiguous().t()
    )
    assert not stored.codes.is_contiguous()
    assert kernels.measure(x, stored).tolist() == kernels.measure(x, plain).tolist()


def test_a_source_with_gaps_and_more_dimensions(kernels: Library) -> None:
    x = mixed((6, 32, 96), torch.bfloat16)
    plain = quantised(x.reshape(-1, 96), "mxfp8 rowwise", "e4m3")
    wide = torch.full((6, 32, 2, 96), 7.0, dtype=torch.bfloat16)
    wide[:, :, 0] = x
    for source in (x, wide[:, :, 0], x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert kernels.measure(source, plain).tolist() == kernels.measure(x, plain).tolist()


def test_sums_of_large_and_of_small_numbers_neither_overflow_nor_vanish(kernels: Library) -> None:
    """As where the squares leave what fp32 holds, and where one element is all of the norm."""
    for factor in (1e-38, 1e30):
        x = mixed((64, 96), torch.float32, special=False) * factor
        x[0, 0] *= 1e6
        check(kernels, x, coded := quantised(x, "mxfp8 rowwise", "e4m3"), fp32_scales(coded))


def test_it_is_nearer_to_the_truth_than_the_torch_operations(native: Library) -> None:
    x = mixed((512, 1024), torch.bfloat16, special=False)
    coded = quantised(x, "mxfp8 rowwise", "e4m3")
    truth, found, reference = (
        measured(x, coded, fp32_scales(coded)),
        named(native.measure(x, coded)),
        as_torch(x, coded),
    )
    for name in SUMS:
        assert abs(found[name] / truth[name] - 1) < 1e-12
        assert reference[name] == pytest.approx(truth[name], rel=1e-3)
