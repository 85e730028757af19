"""What is measured of a tensor in torch operations, where elements are of very different magnitude."""

from __future__ import annotations

import pytest
import torch

from nemo_fp8_recipes.telemetry.elements import MEASURED, measure
from nemo_fp8_recipes.telemetry.probes.index import IndexCache
from nemo_fp8_recipes.telemetry.probes.parts import bulk_limit
from nemo_fp8_recipes.telemetry.probes.stored import values
from tests.emulation.kernels.test_measure import fp32_scales, quantised
from tests.telemetry import elements_oracle

SUMS = ("norm", "noise", "bulk_norm", "bulk_noise")
WHOLE = ("tensor", "mxfp8 rowwise", "squares", "nvfp4")


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize(
    ("one", "others"),
    [
        (1e19, 1.0),
        (1e25, 1e-3),
        (3e38, 1e-3),
        (3e38, 1e-38),
        (1.0, 1e-30),
        (1e-20, 1e-38),
        (1e-38, 1e-42),
        (1e-44, 1e-44),
    ],
)
def test_the_bulk_is_not_lost_beside_one_element(kind: str, one: float, others: float, given: bool) -> None:
    """Its squares are far below what fp32 can add to that element's; `given`: what the bulk is follows from
    the codes, as it does of a part of a tensor.
    """
    x = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)).add_(1).mul_(others / 2)
    x[3, 5] = one
    coded = quantised(x, kind, "e4m3")
    scales, found = fp32_scales(coded), values(coded, IndexCache())
    bulk = bulk_limit(coded, IndexCache()) if given else None
    sums = dict(
        zip((n for n, _ in MEASURED), measure(x, found.values, found.limit, bulk).tolist(), strict=True)
    )
    expected = elements_oracle.measured(x, coded, scales, None if bulk is None else bulk.numpy())
    for name in SUMS:
        assert sums[name] == pytest.approx(expected[name], rel=1e-4, abs=0), name
