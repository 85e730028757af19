"""A part of a quantised matrix: its values, and what all codes say of what belongs to the bulk."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nemo_fp8_recipes.numerics import FORMATS
from nemo_fp8_recipes.telemetry.elements import MEASURED, measure
from nemo_fp8_recipes.telemetry.probes.index import IndexCache
from nemo_fp8_recipes.telemetry.probes.parts import bulk_limit, values_between
from nemo_fp8_recipes.telemetry.probes.stored import values
from tests.emulation.kernels.test_measure import BLOCKS, anything, fp32_scales, quantised, swizzled
from tests.numerics.inputs import mixed
from tests.telemetry import elements_oracle

KINDS = st.sampled_from(sorted(BLOCKS))
SEEDS = st.integers(0, 2**32 - 1)
SHAPES = st.tuples(st.integers(1, 290), st.integers(1, 290))
CUTS = st.lists(st.floats(0, 1), max_size=5)
COUNTS = ("elements", "zero_elements", "underflows", "saturated", "nonfinite")
FEW = settings(max_examples=60, deadline=None)


def allowed(shape: tuple[int, int], kind: str) -> tuple[int, int]:
    return (shape[0], -(-shape[1] // 16) * 16) if kind == "nvfp4" else shape


def runs(elements: int, cuts: list[float]) -> list[tuple[int, int]]:
    """First element and the one behind the last of each part; none is empty."""
    ends = sorted({0, elements, *(int(cut * elements) for cut in cuts)})
    return list(pairwise(ends))


@FEW
@given(shape=SHAPES, kind=KINDS, cuts=CUTS, seed=SEEDS)
@example(shape=(1, 1), kind="tensor", cuts=[], seed=0)
@example(shape=(200, 200), kind="squares", cuts=[0.5001], seed=1)  # in a row, in a tile
@example(shape=(3, 288), kind="mxfp8 rowwise", cuts=[0.3, 0.31], seed=2)  # within one block
def test_values_of_a_part_are_those_of_the_whole(
    shape: tuple[int, int], kind: str, cuts: list[float], seed: int
) -> None:
    """Bit for bit, whatever the codes and the scales."""
    shape = allowed(shape, kind)
    coded = anything(shape, kind, "e4m3", seed)
    whole = values(coded, IndexCache())
    limit = whole.limit.expand(whole.values.shape).reshape(-1)
    for first, last in runs(whole.values.numel(), cuts):
        part = values_between(coded, first, last, IndexCache())
        assert part.values.shape == (1, last - first)
        for found, expected in (
            (part.values, whole.values.reshape(-1)[first:last]),
            (part.limit.expand(part.values.shape), limit[first:last]),
        ):
            assert torch.equal(found[0].nan_to_num(nan=12345.0), expected.nan_to_num(nan=12345.0))


@FEW
@given(shape=SHAPES, kind=KINDS, fmt=st.sampled_from(sorted(FORMATS)), cuts=CUTS, seed=SEEDS)
def test_what_is_measured_of_the_parts_adds_up_to_the_whole(
    shape: tuple[int, int], kind: str, fmt: str, cuts: list[float], seed: int
) -> None:
    shape = allowed(shape, kind)
    x = mixed(shape, torch.bfloat16, seed, special=False)
    coded = quantised(x, kind, fmt)
    scales = fp32_scales(coded)
    bulk = bulk_limit(coded, IndexCache())
    total = torch.zeros(len(MEASURED), dtype=torch.float64)
    for first, last in runs(x.numel(), cuts):
        part = values_between(coded, first, last, IndexCache())
        found = measure(x.reshape(-1)[first:last][None], part.values, part.limit, bulk)
        total[:-1] += found[:-1]
        total[-1] = torch.maximum(total[-1], found[-1])
    sums = dict(zip((name for name, _ in MEASURED), total.tolist(), strict=True))
    expected = elements_oracle.measured(x, coded, scales, elements_oracle.bulk_limit(coded, scales))
    assert {name: sums[name] for name in COUNTS} == {name: expected[name] for name in COUNTS}
    assert sums["largest"] == expected["largest"]
    for name in ("norm", "noise", "bulk_norm", "bulk_noise"):
        assert sums[name] == pytest.approx(expected[name], rel=1e-4), name


@FEW
@given(shape=SHAPES, kind=KINDS, fmt=st.sampled_from(sorted(FORMATS)), related=st.booleans(), seed=SEEDS)
def test_the_bulks_limit_follows_from_the_codes(
    shape: tuple[int, int], kind: str, fmt: str, related: bool, seed: int
) -> None:
    shape = allowed(shape, kind)
    coded = (
        quantised(mixed(shape, torch.float32, seed), kind, fmt)
        if related
        else anything(shape, kind, fmt, seed)
    )
    found = bulk_limit(coded, IndexCache())
    assert found.shape == ()
    assert found.numpy() == elements_oracle.bulk_limit(coded, fp32_scales(coded))


@pytest.mark.parametrize("kind", BLOCKS)
def test_the_bulk_is_what_the_99th_percentile_makes_of_it(kind: str) -> None:
    """Of a matrix of which a sample is looked at."""
    x = torch.randn(300, 512, generator=torch.Generator().manual_seed(0))
    coded = quantised(x, kind, "e4m3")
    share = (x.abs() <= bulk_limit(coded, IndexCache())).float().mean()
    assert share == pytest.approx(0.99, abs=0.005 if kind == "nvfp4" else 0.001)


def test_what_an_outlier_makes_zero_is_the_bulk() -> None:
    """The limit is not zero there: of the elements that became zero the error is all that there was."""
    x = torch.full((64, 64), 1e-3)
    x[0, 0] = 1e6
    coded = quantised(x, "tensor", "e4m3")
    bulk = bulk_limit(coded, IndexCache())
    assert float(bulk) > 1e-3
    part = values_between(coded, 0, x.numel(), IndexCache())
    sums = dict(zip((n for n, _ in MEASURED), measure(x.reshape(1, -1), *part, bulk).tolist(), strict=True))
    assert sums["underflows"] == x.numel() - 1
    assert sums["bulk_noise"] == pytest.approx(sums["bulk_norm"])
    assert sums["bulk_norm"] == pytest.approx((x.numel() - 1) * 1e-6, rel=1e-4)


@pytest.mark.parametrize("shape", [(128, 128), (160, 416)])
@pytest.mark.parametrize(
    ("kind", "swizzle"),
    [("mxfp8 rowwise", "rowwise"), ("mxfp8 columnwise", "columnwise"), ("nvfp4", "rowwise")],
)
def test_scales_in_the_gemms_order(shape: tuple[int, int], kind: str, swizzle: str) -> None:
    plain = quantised(mixed(shape, torch.bfloat16), kind, "e4m3")
    arranged = swizzled(plain, swizzle)
    assert torch.equal(bulk_limit(arranged, IndexCache()), bulk_limit(plain, IndexCache()))
    first, last = shape[1] + 5, 70 * shape[1] + 3
    found, expected = (values_between(one, first, last, IndexCache()) for one in (arranged, plain))
    assert np.array_equal(found.values.numpy(), expected.values.numpy(), equal_nan=True)
    assert np.array_equal(found.limit.numpy(), expected.limit.numpy(), equal_nan=True)
