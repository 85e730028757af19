"""What a logging step may not do on a GPU: wait for it, launch more for more modules, or touch a capture.

The probes run on fake tensors, which have no values: whatever asks for one (`item`, `nonzero`, a branch on a
tensor) raises, where on a GPU it would wait for the device. They pose as CPU tensors, as torch without CUDA
cannot index fake ones of a GPU; the path that only a GPU takes is switched on by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from nemo_fp8_recipes.telemetry.codec import encode
from nemo_fp8_recipes.telemetry.elements import MEASURED, measure
from nemo_fp8_recipes.telemetry.exchange import Exchange
from nemo_fp8_recipes.telemetry.groups import Experts
from nemo_fp8_recipes.telemetry.linears import Linear, Operand
from nemo_fp8_recipes.telemetry.probes import (
    BlockProbe,
    DelayedProbe,
    ElementProbe,
    Nvfp4Probe,
    Reading,
    TensorwiseProbe,
    scale_codes,
)
from nemo_fp8_recipes.telemetry.probes.index import IndexCache
from nemo_fp8_recipes.telemetry.weights import MainCopy
from nemo_fp8_recipes.telemetry.whatif import RECIPES, WhatIf
from tests.telemetry.launches import Launches
from tests.telemetry.test_delayed_probe import Module

M, K = 256, 512
UPLOADS = ("copy", "to_copy", "lift_fresh")


class Dtype:
    def __init__(self, name: str) -> None:
        self.name = name


class Quantizer:
    """The attributes of a quantizer that are read; its class is named like Transformer Engine's."""

    dtype = Dtype("kFloat8E4M3")
    block_scaling_dim = 1
    force_pow_2_scales = False


QUANTIZERS = {
    "delayed": "Float8Quantizer",
    "tensorwise": "Float8CurrentScalingQuantizer",
    "blockwise": "Float8BlockQuantizer",
    "mxfp8": "MXFP8Quantizer",
    "nvfp4": "NVFP4Quantizer",
}


def quantizer(recipe: str) -> Any:
    made = type(QUANTIZERS[recipe], (Quantizer,), {})()
    if recipe == "nvfp4":
        made.dtype = Dtype("kFloat4E2M1")
    return made


class Stored:
    """The attributes of a quantised tensor that are read."""

    def __init__(self, recipe: str) -> None:
        def make(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
            return torch.zeros(shape, dtype=dtype)

        fp32 = torch.float32
        self._with_gemm_swizzled_scales = recipe == "mxfp8"
        self._data, self._transpose, self._transpose_invalid = make(M, K), None, True
        self._scale_inv = make(1, dtype=fp32)
        self._rowwise_data = make(M, K // 2 if recipe == "nvfp4" else K)
        self._amax_rowwise, self._amax_columnwise = make(1, dtype=fp32), None
        self._columnwise_data = self._columnwise_scale_inv = None
        scales = {
            "blockwise": lambda: make(K // 128, M, dtype=fp32),
            "mxfp8": lambda: make(M, K // 32),
            "nvfp4": lambda: make(M, K // 16),
        }
        self._rowwise_scale_inv = scales.get(recipe, lambda: None)()


def probe_for(recipe: str) -> Any:
    indices = IndexCache()
    return {
        "tensorwise": lambda: TensorwiseProbe(indices),
        "blockwise": lambda: BlockProbe(indices, "blockwise"),
        "mxfp8": lambda: BlockProbe(indices, "mxfp8"),
        "nvfp4": lambda: Nvfp4Probe(indices),
    }[recipe]()


def cheap(recipe: str, modules: int) -> list[str]:
    """Operations of a logging step of the cheap tier."""
    if recipe == "delayed":
        owners = [Module(16) for _ in range(modules)]
        linears = tuple(Linear(f"m{index}", owner, 0) for index, owner in enumerate(owners))
        watching: Any = DelayedProbe(linears, IndexCache(), history=True)
        states = [owner.fp8_meta["scaling_fwd"] for owner in owners]
        histories, scales = [state.amax_history for state in states], [state.scale for state in states]
        amax = torch.zeros(3 * modules)
        with Launches() as launches:
            watching.fused_update(lambda *_: None)(amax, histories, scales)
            assert watching.end() is not None
        return launches.names
    watching, made_by = probe_for(recipe), quantizer(recipe)
    tensors = [Stored(recipe) for _ in range(modules)]
    with Launches() as launches:
        for index, tensor in enumerate(tensors):
            watching.quantised(Operand(f"m{index}", "input"), made_by, tensor)
        assert watching.end() is not None
    return launches.names


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_codes, "_HOSTS", ())


def fake() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


def on_fake_tensors(work: Callable[[], object]) -> list[str]:
    """Operations that `work` runs on fake tensors."""
    with fake(), Launches() as launches:
        work()
    return launches.names


def test_a_hidden_wait_would_be_noticed() -> None:
    with fake(), pytest.raises(DataDependentOutputException):
        torch.zeros(1).item()


@pytest.mark.parametrize("recipe", QUANTIZERS)
def test_the_cheap_tier_neither_waits_nor_grows(recipe: str) -> None:
    with fake():
        few, many = cheap(recipe, 2), cheap(recipe, 96)
    assert few == many
    assert 0 < len(few) < 130
    assert not {"sort", "topk", "kthvalue"} & set(few)


@pytest.mark.parametrize("recipe", QUANTIZERS)
def test_the_stats_tier_does_not_wait_and_ends_in_the_same_number_of_launches(recipe: str) -> None:
    ends = {}
    for modules in (2, 24):
        with fake():
            probe = ElementProbe(IndexCache())
            source = torch.zeros(M, K, dtype=torch.bfloat16)
            for index in range(modules):
                probe.quantised(Operand(f"m{index}", "input"), quantizer(recipe), Stored(recipe), source)
            with Launches() as launches:
                assert probe.end() is not None
            ends[modules] = len(launches.names)
    assert ends[2] == ends[24] < 30


@pytest.mark.parametrize("first", [0, K // 2 + 1])
@pytest.mark.parametrize("recipe", QUANTIZERS)
def test_a_part_of_a_primary_weight_does_not_wait(recipe: str, first: int) -> None:
    """From the start of the weight and from the middle of a row."""
    a_weight, ends = {}, {}
    for modules in (2, 24):
        with fake():
            probe = ElementProbe(IndexCache())
            copies = [MainCopy(torch.zeros(5 * K + 7).bfloat16(), first, group) for group in (0, 1)]
            probe.kept(Operand("m0", "weight"), quantizer(recipe), Stored(recipe), copies[0])
            probe.begin()  # indices are uploaded once
            with Launches() as launches:
                for index in range(modules):
                    operand = Operand(f"m{index}", "weight")
                    probe.kept(operand, quantizer(recipe), Stored(recipe), copies[index % 2])
            a_weight[modules] = len(launches.names) / modules
            with Launches() as launches:
                reading = probe.end()
            ends[modules] = len(launches.names)
        assert reading is not None
        assert len(reading.specs) == modules * (len(MEASURED) + 1) == reading.values.numel()
    assert a_weight[2] == a_weight[24] < 130
    assert ends[2] == ends[24] < 30


@pytest.mark.parametrize("members", [1, 4])
def test_judging_other_recipes_does_not_wait(members: int) -> None:
    def judge() -> None:
        experts = Experts(members, torch.zeros(M, dtype=torch.int64)) if members > 1 else None
        whatif = WhatIf(["*"], IndexCache())
        source = torch.zeros(M, K, dtype=torch.bfloat16)
        for tensor in ("input", "weight", "grad_output"):
            for _ in range(2):
                whatif.quantised(Operand("m", tensor), "tensorwise", source, judge=True, experts=experts)
                reading = whatif.end()
        assert reading is not None
        assert {spec.recipe for spec in reading.specs} == set(RECIPES) - {"tensorwise"}

    on_fake_tensors(judge)


def test_the_exchange_encodes_without_waiting() -> None:
    on_fake_tensors(lambda: encode(torch.zeros(7), torch.zeros(7) != 0))


def test_measure_takes_a_bounded_number_of_launches() -> None:
    def work() -> None:
        source = torch.zeros(M, K, dtype=torch.bfloat16)
        measure(source, source.float(), torch.ones(()))

    assert len(on_fake_tensors(work)) < 70


def test_one_collective_a_logging_step_however_many_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    reduced: list[int] = []
    monkeypatch.setattr(dist, "all_reduce", lambda places, **_: reduced.append(places.numel()))
    monkeypatch.setattr(
        dist, "all_gather_object", lambda out, mine, **_: out.__setitem__(slice(None), [mine] * 2)
    )
    exchange = Exchange(None, writer=True)
    exchange._world_size = 2
    from nemo_fp8_recipes.telemetry.probes.base import ReadingSpec

    for modules in (2, 300):
        specs = tuple(
            ReadingSpec(f"m{index:03d}", "input", name, "mxfp8", "e4m3", combine)
            for index in range(modules)
            for name, combine in (("a", "max"), ("b", "mean"), ("c", "rms"), ("d", "min"))
        )
        exchange.start(
            Reading(specs, torch.ones(len(specs))), torch.device("cpu"), kind=str(modules)
        ).result()
    assert len(reduced) == 2
