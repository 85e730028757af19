"""What the observer itself asks of the device in steps of both tiers, on tensors that pose as a GPU's.

Modules, quantizers and what these make are stand-ins with the attributes that are read; observer, recorder
and exchange are the real ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_fp8_recipes.telemetry.exchange import Exchange
from nemo_fp8_recipes.telemetry.linears import Linear
from nemo_fp8_recipes.telemetry.observer import Observer
from nemo_fp8_recipes.telemetry.recorder import Recorder
from tests.telemetry.device import CountingDevice, CountingEvent
from tests.telemetry.test_counts import CountingSink
from tests.telemetry.test_no_waiting import QUANTIZERS, K, M, Stored
from tests.telemetry.test_no_waiting import quantizer as attributes_of_quantizer

LOG_EVERY, STATS_EVERY = 2, 4
RECIPES = tuple(name for name in QUANTIZERS if name != "delayed")
"""Delayed scaling's state is not in what a function quantises; test_counts.py has its probe."""


def of_te(kind: type, base: str, name: str) -> Any:
    """A class that is recognised as Transformer Engine's, with the attributes of `kind`."""
    parent = type(base, (), {"__module__": "transformer_engine.stand_in"})
    return type(name, (kind, parent), {"__module__": "transformer_engine.stand_in"})


class Module(torch.nn.Module):
    """What is read of a Transformer Engine linear."""

    def __init__(self, recipe: str) -> None:
        super().__init__()
        self.fp8 = True
        self.fp8_meta: dict[str, Any] = {}
        self._fp8_workspaces: dict[str, Any] = {}
        made_by = of_te(type(attributes_of_quantizer(recipe)), "Quantizer", QUANTIZERS[recipe])
        forward = [made_by(), made_by(), None]
        backward = [made_by(), None]
        for one in (*forward[:2], backward[0]):
            one.dtype = attributes_of_quantizer(recipe).dtype
        self.quantizers = {"scaling_fwd": forward, "scaling_bwd": backward}


class NoSeam:
    """Stands for the seam: the test calls what it would have put in place."""

    def open(self) -> None: ...

    def close(self) -> None: ...


class Run:
    """A recorder and its observer of some modules, on a device that counts."""

    def __init__(self, recipe: str, modules: int) -> None:
        self.sink = CountingSink()
        with torch.device("meta"):
            self.modules = [Module(recipe) for _ in range(modules)]
            self.source = torch.zeros(M, K, dtype=torch.bfloat16)
            model = torch.nn.Linear(1, 1)
        self.recorder = Recorder(
            model,
            Exchange(None, writer=True),
            [self.sink],
            log_every=LOG_EVERY,
            flush_every=100,
            history=True,
            stats_every=STATS_EVERY,
        )
        observer = self.recorder._observer
        assert isinstance(observer, Observer)
        observer._linears = tuple(Linear(f"m{n}", one, 0) for n, one in enumerate(self.modules))
        observer._seam = NoSeam()  # type: ignore[assignment]  # it needs Transformer Engine
        made = of_te(Stored, "QuantizedTensorStorage", "Made")

        def quantize(x: Tensor, quantizer: Any) -> Any:
            del x, quantizer
            with torch.device("meta"):
                return made(recipe)

        self.quantize, self.watched = quantize, observer._quantising("quantize", quantize)

    def step(self, number: int) -> tuple[CountingDevice, CountingDevice, int]:
        """What the step's quantising calls and the end of the step ask for beside the calls themselves, and
        how often the beginning waits.
        """
        waited = CountingEvent.waited
        self.recorder.begin_step(number)
        waits = CountingEvent.waited - waited
        call = self.watched if self.recorder.logs(number) else self.quantize
        with CountingDevice() as alone:
            for _ in range(3 * len(self.modules)):
                self.quantize(self.source, None)
        with CountingDevice() as calls:
            for module in self.modules:
                for quantizer in (*module.quantizers["scaling_fwd"][:2], module.quantizers["scaling_bwd"][0]):
                    call(self.source, quantizer)
        with CountingDevice() as end:
            self.recorder.end_step(number, {"loss": 1.0})
        assert CountingEvent.waited - waited == waits  # nothing waits once the step has begun
        calls.launches = calls.launches[len(alone.launches) :]
        return calls, end, waits


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "Event", CountingEvent)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    # The emulated device, if an earlier test has put it there, takes the wish for pinned memory away.
    monkeypatch.setattr(torch, "empty", inspect.unwrap(torch.empty))
    yield
    CountingEvent.recorded = CountingEvent.waited = 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_that_does_not_log_asks_for_nothing(recipe: str) -> None:
    run = Run(recipe, 2)
    for number in range(1, 2 * STATS_EVERY + 2):
        calls, end, waits = run.step(number)
        if number == 1 or number % LOG_EVERY == 0:
            assert end.to_host == [(True, True)]  # one copy, without waiting, to pinned memory
            assert calls.to_host == []
        else:
            assert calls.idle
            assert end.idle
        assert waits == (number == 2 or (number > LOG_EVERY and number % LOG_EVERY == 1))
    assert run.sink.steps == [1, 2, 4, 6, 8]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_cheap_tier_launches_nothing_at_a_call_and_as_much_at_the_end_for_any_model(recipe: str) -> None:
    ends = {}
    for modules in (2, 40):
        run = Run(recipe, modules)
        for number in (1, 2, 3, 6):
            calls, end, _ = run.step(number)
        assert calls.idle
        assert end.to_device == 0  # indices are uploaded once
        assert end.to_host == [(True, True)]
        ends[modules] = end.launches
    assert ends[2] == ends[40] != []


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_stats_tier_launches_as_much_for_every_tensor_and_at_the_end_for_any_model(recipe: str) -> None:
    a_tensor, ends = {}, {}
    for modules in (2, 40):
        run = Run(recipe, modules)
        for number in (1, STATS_EVERY, 2 * STATS_EVERY):
            calls, end, _ = run.step(number)
        tensors = 3 * modules
        assert len(calls.launches) % tensors == 0
        a_tensor[modules] = len(calls.launches) // tensors
        assert (calls.to_host, calls.to_device, end.to_device) == ([], 0, 0)
        assert end.to_host == [(True, True)]
        ends[modules] = end.launches
    assert 0 < a_tensor[2] == a_tensor[40] < 90
    assert ends[2] == ends[40] != []
