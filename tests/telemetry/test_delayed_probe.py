"""The delayed probe around updates by a scalar model of Transformer Engine's rule."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nemo_fp8_recipes.telemetry.derive import derive
from nemo_fp8_recipes.telemetry.exchange import Exchange
from nemo_fp8_recipes.telemetry.linears import Linear
from nemo_fp8_recipes.telemetry.probes import DelayedProbe
from nemo_fp8_recipes.telemetry.probes.index import IndexCache

FLT_MAX = np.finfo(np.float32).max


@dataclass
class State:
    amax_history: Tensor
    scale: Tensor


@dataclass
class Dtype:
    name: str = "kFloat8E4M3"


@dataclass
class Quantizer:
    dtype: Dtype = field(default_factory=Dtype)


class Module:
    """What the probe reads of a Transformer Engine linear."""

    def __init__(self, length: int) -> None:
        self.fp8_meta = {
            "scaling_fwd": State(torch.zeros(length, 3), torch.ones(3)),
            "scaling_bwd": State(torch.zeros(length, 2), torch.ones(2)),
        }
        self.quantizers = {"scaling_fwd": [Quantizer()] * 3, "scaling_bwd": [Quantizer()] * 2}


def update(amax: Tensor, histories: list[Tensor], scales: list[Tensor], fp8_max: float) -> None:
    """One update, slot by slot, as `kernel_bulk` in delayed_scaling.cu does it with "max"."""
    position = 0
    for history, scale in zip(histories, scales, strict=True):
        for column in range(scale.numel()):
            newest = amax[position].item()
            position += 1
            if newest == 0.0:
                continue
            kept = history[1:, column].tolist()
            window = [value for value in [*kept, newest] if not math.isnan(value)]
            largest = max([0.0, *window])
            history[:, column] = torch.tensor([*kept, newest])
            history[0, column] = 0.0
            if math.isfinite(largest) and largest > 0:
                factor = np.float32(fp8_max) / np.float32(largest)
                scale[column] = float(min(factor, FLT_MAX))


class Updates:
    """Modules with one global buffer, updated through the probe."""

    def __init__(self, length: int, modules: int = 3) -> None:
        self.modules = [Module(length) for _ in range(modules)]
        linears = tuple(Linear(f"m{index}", module, 0) for index, module in enumerate(self.modules))
        self.probe = DelayedProbe(linears, IndexCache(), history=True)

    def states(self) -> list[State]:
        return [module.fp8_meta["scaling_fwd"] for module in self.modules]

    def run(self, amax: Tensor) -> None:
        histories = [state.amax_history for state in self.states()]
        scales = [state.scale for state in self.states()]
        self.probe.fused_update(update)(amax.reshape(-1), histories, scales, 448.0)

    def log(self) -> dict[tuple[str, str, str], Any]:
        found = Exchange(None, writer=True).start(self.probe.end(), torch.device("cpu")).result()
        values = derive(1, found)
        logged: dict[tuple[str, str, str], Any] = {
            (s.module, s.tensor, s.stat): float(v) for s, v in zip(values.series, values.values, strict=True)
        }
        for s, window in values.windows.items():
            logged[s.module, s.tensor, s.stat] = window.tolist()
        return logged


def rule(scale: float, window: list[float]) -> float:
    """The next scale from a logged row, as docs/schemas/telemetry.md states it."""
    largest = max([value for value in window if not math.isnan(value)], default=0.0)
    if window[-1] == 0 or not math.isfinite(largest) or largest <= 0:
        return scale
    return float(np.minimum(np.float32(448.0) / np.float32(largest), FLT_MAX))


def check_rule(logged: dict[tuple[str, str, str], Any]) -> None:
    operands = {key[:2] for key in logged}
    assert operands
    for module, tensor in operands:
        row = {stat: logged[module, tensor, stat] for stat in ("scale", "scale_next", "amax_history", "amax")}
        assert row["scale_next"] == rule(row["scale"], row["amax_history"]), (module, tensor, row)


@pytest.mark.parametrize("length", [1, 2, 3, 16])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_next_scale_follows_from_the_logged_row(length: int, micro_batches: int) -> None:
    torch.manual_seed(length)
    updates = Updates(length)
    previous: dict[tuple[str, str, str], Any] = {}
    for _ in range(8):
        updates.probe.begin()
        seen = []
        for _ in range(micro_batches):
            amax = torch.randn(3, 3).exp()
            amax[torch.rand(3, 3) < 0.2] = 0.0
            seen.append(amax)
            updates.run(amax)
        logged = updates.log()
        check_rule(logged)
        for index in range(3):
            for column, tensor in enumerate(("input", "weight")):
                key = (f"m{index}", tensor)
                assert logged[(*key, "amax")] == max(a[index, column].item() for a in seen)
                assert len(logged[(*key, "amax_history")]) == length
                if previous and micro_batches == 1:
                    assert logged[(*key, "scale")] == previous[(*key, "scale_next")]
        previous = logged


@pytest.mark.parametrize("special", [math.inf, math.nan])
def test_a_special_amax_is_logged_and_follows_the_rule(special: float) -> None:
    updates = Updates(3, modules=1)
    for value in (2.0, special, 4.0, 1.0, 1.0, 1.0):
        updates.probe.begin()
        updates.run(torch.full((1, 3), value))
        logged = updates.log()
        check_rule(logged)
        assert logged["m0", "input", "amax"] == pytest.approx(value, nan_ok=True)


def test_the_oldest_entry_counts_before_it_is_dropped() -> None:
    updates = Updates(3, modules=1)
    for value in (8.0, 1.0, 1.0):
        updates.probe.begin()
        updates.run(torch.full((1, 3), value))
        logged = updates.log()
    # The state after the update no longer holds the 8 that its scale came from; the logged window does.
    assert updates.states()[0].amax_history[:, 0].tolist() == [0.0, 1.0, 1.0]
    assert logged["m0", "input", "amax_history"] == [8.0, 1.0, 1.0]
    assert logged["m0", "input", "scale_next"] == 56.0


def test_a_weight_cast_in_the_first_micro_batch_only_shows_that_cast() -> None:
    updates = Updates(4, modules=1)
    updates.run(torch.tensor([[1.0, 2.0, 0.0]]))
    updates.log()
    updates.probe.begin()
    updates.run(torch.tensor([[1.0, 4.0, 0.0]]))
    updates.run(torch.tensor([[3.0, 0.0, 0.0]]))
    logged = updates.log()
    assert logged["m0", "weight", "scale"] == 224.0
    assert logged["m0", "weight", "scale_next"] == 112.0
    assert logged["m0", "weight", "amax_history"] == [0.0, 0.0, 2.0, 4.0][-4:]
    assert logged["m0", "input", "amax_history"] == [0.0, 1.0, 1.0, 3.0]


def test_the_scale_is_the_one_the_last_cast_used() -> None:
    updates = Updates(4, modules=1)
    updates.run(torch.full((1, 3), 2.0))
    updates.run(torch.full((1, 3), 4.0))
    logged = updates.log()
    # The first micro-batch was cast with 1, the second with the scale that the first one led to.
    assert logged["m0", "input", "scale"] == 224.0
    assert logged["m0", "input", "scale_next"] == 112.0
    assert logged["m0", "input", "amax_history"] == [0.0, 0.0, 2.0, 4.0]


def test_the_unfused_path_logs_the_same() -> None:
    fused, unfused = Updates(4), Updates(4)
    torch.manual_seed(3)
    for _ in range(3):
        amax = torch.rand(3, 3)
        fused.probe.begin()
        unfused.probe.begin()
        fused.run(amax)
        for state, live in zip(unfused.states(), amax, strict=True):
            state.amax_history[0] = live

            def one(history: Tensor, scale: Tensor) -> None:
                update(history[0].clone(), [history], [scale], 448.0)

            unfused.probe.unfused_update(one)(state.amax_history, state.scale)
        assert fused.log() == unfused.log()


def test_gradients_and_forward_operands_have_their_own_slots() -> None:
    updates = Updates(2, modules=2)
    updates.run(torch.arange(1.0, 7.0).reshape(2, 3))
    backward = [module.fp8_meta["scaling_bwd"] for module in updates.modules]
    updates.probe.fused_update(update)(
        torch.tensor([10.0, 11.0, 12.0, 13.0]),
        [state.amax_history for state in backward],
        [state.scale for state in backward],
        57344.0,
    )
    logged = updates.log()
    assert {key[:2]: value for key, value in logged.items() if key[2] == "amax"} == {
        ("m0", "input"): 1.0,
        ("m0", "weight"): 2.0,
        ("m1", "input"): 4.0,
        ("m1", "weight"): 5.0,
        ("m0", "grad_output"): 10.0,
        ("m1", "grad_output"): 12.0,
    }
