"""What a logging step asks for and the other steps do not, counted: copies, waits, launches, sink calls."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from nemo_fp8_recipes.telemetry.exchange import Exchange
from nemo_fp8_recipes.telemetry.linears import Linear, Operand
from nemo_fp8_recipes.telemetry.probes import DelayedProbe, Reading
from nemo_fp8_recipes.telemetry.probes.index import IndexCache
from nemo_fp8_recipes.telemetry.recorder import Recorder
from nemo_fp8_recipes.telemetry.series import StepValues
from nemo_fp8_recipes.telemetry.sinks import Sink
from tests.telemetry.device import CountingDevice, CountingEvent
from tests.telemetry.test_delayed_probe import Module
from tests.telemetry.test_no_waiting import QUANTIZERS, Stored, probe_for, quantizer

LOG_EVERY = 3


class Probed:
    """Stands for the observer: in a logging step one probe is given every module's tensors and is read."""

    def __init__(self, recipe: str, modules: int) -> None:
        self._recipe = recipe
        self._modules = modules
        if recipe == "delayed":
            owners = [Module(16) for _ in range(modules)]
            linears = tuple(Linear(f"m{index}", owner, 0) for index, owner in enumerate(owners))
            self._probe: Any = DelayedProbe(linears, IndexCache(), history=True)
            self._states = [owner.fp8_meta["scaling_fwd"] for owner in owners]
            self._amax = torch.zeros(3 * modules)
        else:
            self._probe = probe_for(recipe)
            self._quantizer = quantizer(recipe)
            self._tensors = [Stored(recipe) for _ in range(modules)]

    def begin(self, *, stats: bool) -> None:
        self._probe.begin()

    def end(self) -> Reading:
        if self._recipe == "delayed":
            histories = [state.amax_history for state in self._states]
            scales = [state.scale for state in self._states]
            self._probe.fused_update(lambda *_: None)(self._amax, histories, scales)
        else:
            for index, tensor in enumerate(self._tensors):
                self._probe.quantised(Operand(f"m{index}", "input"), self._quantizer, tensor)
        reading: Reading = self._probe.end()
        return reading

    def abandon(self) -> None:
        pass


class CountingSink(Sink):
    """Counts its calls."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.metric_steps: list[int] = []

    def values(self, values: StepValues) -> None:
        assert len(values)
        self.steps.append(values.step)

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self.metric_steps.append(step)


@dataclasses.dataclass
class Counted:
    """What one step asked of the device."""

    launches: list[str]
    to_host: list[tuple[bool, bool]]
    to_device: int
    waits: int


class Run:
    """A recorder on a device that counts."""

    def __init__(self, recipe: str, modules: int = 2) -> None:
        with torch.device("meta"):
            model = torch.nn.Linear(1, 1)
            probed = Probed(recipe, modules)
        self.sinks = [CountingSink(), CountingSink()]
        self.recorder = Recorder(
            model, Exchange(None, writer=True), self.sinks, log_every=LOG_EVERY, flush_every=100, history=True
        )
        self.recorder._observer = probed  # type: ignore[assignment]  # a stand-in for what needs a GPU library

    def step(self, number: int) -> Counted:
        waited = CountingEvent.waited
        with CountingDevice() as device:
            self.recorder.begin_step(number)
            self.recorder.end_step(number, {"loss": 1.0})
        waits = CountingEvent.waited - waited
        return Counted(device.launches, device.to_host, device.to_device, waits)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "Event", CountingEvent)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    # The emulated device, if an earlier test has put it there, takes the wish for pinned memory away.
    monkeypatch.setattr(torch, "empty", inspect.unwrap(torch.empty))
    yield
    CountingEvent.recorded = CountingEvent.waited = 0


@pytest.mark.parametrize("recipe", QUANTIZERS)
def test_one_copy_to_the_host_a_logging_step_and_nothing_in_the_others(recipe: str) -> None:
    run = Run(recipe)
    for number in range(1, 3 * LOG_EVERY + 2):
        counted = run.step(number)
        if number == 1 or number % LOG_EVERY == 0:
            assert counted.to_host == [(True, True)]  # without waiting, to pinned memory
            assert counted.launches
            assert counted.to_device == 0 or number == 1  # indices are uploaded once
        else:
            assert (counted.launches, counted.to_host, counted.to_device) == ([], [], 0)
        # The copy is waited for when the next step begins, and at no other time.
        follows = number == 2 or (number > LOG_EVERY and number % LOG_EVERY == 1)
        assert counted.waits == follows
    assert CountingEvent.recorded == CountingEvent.waited == 4


@pytest.mark.parametrize("recipe", QUANTIZERS)
def test_a_logging_step_of_many_modules_asks_for_no_more_than_one_of_few(recipe: str) -> None:
    few, many = Run(recipe, 2), Run(recipe, 48)
    for number in (1, LOG_EVERY):
        assert few.step(number) == many.step(number)


def test_one_call_to_each_sink_a_logging_step_however_many_modules() -> None:
    for modules in (2, 48):
        run = Run("mxfp8", modules)
        for number in range(1, 2 * LOG_EVERY + 2):
            run.step(number)
        for sink in run.sinks:
            assert sink.steps == [1, LOG_EVERY, 2 * LOG_EVERY]
            assert sink.metric_steps == list(range(1, 2 * LOG_EVERY + 2))


def test_a_step_that_is_captured_in_a_graph_launches_and_copies_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run("mxfp8")
    run.step(1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for number in (2, LOG_EVERY):
        assert run.step(number) == Counted([], [], 0, 0)
    assert run.sinks[0].steps == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    run.step(LOG_EVERY + 1)
    assert run.sinks[0].steps == [1]  # what was on its way when the capture began


def test_a_hidden_wait_would_be_noticed() -> None:
    with CountingDevice() as device, pytest.raises(RuntimeError):
        torch.zeros(1, device="meta").item()
    assert not device.to_host
