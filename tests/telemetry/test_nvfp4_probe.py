"""NVFP4: the amax of a tensor and the distribution of its block scales come out of one step."""

from __future__ import annotations

import pytest
import torch

from nemo_fp8_recipes.numerics.cast import decode
from nemo_fp8_recipes.numerics.formats import E4M3
from nemo_fp8_recipes.telemetry.linears import Operand
from nemo_fp8_recipes.telemetry.probes import Nvfp4Probe
from nemo_fp8_recipes.telemetry.probes.index import IndexCache

pytestmark = pytest.mark.usefixtures("emulated")


def test_a_step_has_the_amax_and_the_block_scales():
    import transformer_engine.pytorch as te

    quantizer = te.NVFP4Quantizer()
    x = torch.randn(96, 64).bfloat16()
    tensor = quantizer(x)
    probe = Nvfp4Probe(IndexCache())
    for _ in range(2):  # a step leaves nothing to the next one
        probe.begin()
        probe.quantised(Operand("m", "input"), quantizer, tensor)
        reading = probe.end()
        assert reading is not None
        found = dict(zip((spec.name for spec in reading.specs), reading.values.tolist(), strict=True))
        scales = decode(tensor._rowwise_scale_inv[:96, :4], E4M3)
        assert found["amax"] == x.abs().max().item()
        assert found["scale_inv_max"] == scales.max().item()
        assert found["scale_inv_min"] == scales.min().item()
        assert found["blocks"] == 96 * 4


def test_of_an_amax_a_row_the_largest_is_read():
    import transformer_engine.pytorch as te

    quantizer = te.NVFP4Quantizer()
    x = torch.randn(96, 64).bfloat16()
    rows, whole = quantizer(x), quantizer(x / 2)
    rows._amax_rowwise = x.abs().amax(dim=1).float()
    probe = Nvfp4Probe(IndexCache())
    for tensor in (whole, rows, whole):
        probe.quantised(Operand("m", "input"), quantizer, tensor)
    probe.quantised(Operand("m", "weight"), quantizer, whole)
    reading = probe.end()
    assert reading is not None
    found = {
        (spec.tensor, spec.name): value
        for spec, value in zip(reading.specs, reading.values.tolist(), strict=True)
    }
    assert found["input", "amax"] == x.abs().max().item()
    assert found["weight", "amax"] == (x / 2).abs().max().item()
    assert found["weight", "blocks"] == 96 * 4
