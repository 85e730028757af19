"""Sinks: what they write, and that a failing one neither stops the training nor stays unnoticed."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.telemetry import store
from nemo_fp8_recipes.telemetry.series import Series, StepValues
from nemo_fp8_recipes.telemetry.sinks import GuardedSink, Sink, build
from tests.telemetry.examples import METADATA, step


def scalars(directory: Path) -> dict[str, dict[int, float]]:
    """tag -> step -> value, as TensorBoard's own reader understands the event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        tag: {event.step: event.value for event in accumulator.Scalars(tag)}
        for tag in accumulator.Tags()["scalars"]
    }


def test_parquet_holds_steps_until_it_is_flushed(tmp_path: Path) -> None:
    (sink,) = build(["parquet"], tmp_path, METADATA)
    sink.values(step(1))
    assert store.steps(tmp_path) is None
    assert sink.unwritten() == len(step(1))
    sink.flush()
    sink.values(step(10))
    sink.truncate_after(1)
    sink.close()
    assert store.steps(tmp_path) == (1, 1)


def test_tensorboard_has_values_and_metrics_under_their_names(tmp_path: Path) -> None:
    (sink,) = build(["tensorboard"], tmp_path, METADATA)
    sink.metrics(1, {"loss": 5.5})
    sink.values(step(1, window=3))
    sink.close()
    found = scalars(tmp_path / "tensorboard")
    assert found["train/loss"] == {1: 5.5}
    values = step(1)
    for name, value in zip(values.series, values.values, strict=True):
        assert found[name.tag] == {1: pytest.approx(float(value), rel=0)}
    assert len(found) == len(values.series) + 1
    assert "fp8/decoder.layers.0.mlp.linear_fc1/input/amax" in found


def test_tensorboard_hides_what_a_resumed_run_writes_again(tmp_path: Path) -> None:
    (first,) = build(["tensorboard"], tmp_path, METADATA)
    for number in (1, 2, 3, 4):
        first.metrics(number, {"loss": float(number)})
    first.close()
    (second,) = build(["tensorboard"], tmp_path, METADATA)
    second.truncate_after(2)
    second.metrics(3, {"loss": 30.0})
    second.close()
    assert scalars(tmp_path / "tensorboard")["train/loss"] == {1: 1.0, 2: 2.0, 3: 30.0}


def test_json_lines_survive_special_values_and_truncation(tmp_path: Path) -> None:
    (sink,) = build(["jsonl"], tmp_path, METADATA)
    names = tuple(Series("m", "input", stat, "delayed", "e4m3") for stat in ("a", "b", "c"))
    for number in (1, 2, 3):
        sink.values(StepValues(number, names, np.asarray([np.nan, np.inf, number], dtype=np.float32)))
    path = tmp_path / "telemetry" / "values.jsonl"
    with path.open("a") as file:
        file.write('{"step": 4, "val')  # the process was killed here
    sink.truncate_after(2)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[1]["values"] == {"fp8/m/input/a": "NaN", "fp8/m/input/b": "Infinity", "fp8/m/input/c": 2.0}


def test_an_unknown_sink_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no sink 'wandbb'"):
        build(["wandbb"], tmp_path, METADATA)


class Failing(Sink):
    """Fails from the `after`th call on, `times` times."""

    name = "failing"

    def __init__(self, after: int, times: int = 10**9) -> None:
        self.after = after
        self.times = times
        self.calls = 0
        self.taken: list[int] = []

    def _call(self, number: int) -> None:
        self.calls += 1
        if self.calls > self.after and self.times > 0:
            self.times -= 1
            raise OSError(28, "No space left on device")
        self.taken.append(number)

    def values(self, values: StepValues) -> None:
        self._call(values.step)

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self._call(step)


def test_a_sink_that_recovers_loses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    failing = Failing(after=0, times=2)
    sink = GuardedSink(failing)
    sink.values(step(1))
    sink.close()
    assert failing.taken == [1]
    assert sink.lost == 0
    assert caplog.records == []


def test_a_sink_that_fails_is_switched_off_with_one_warning_and_a_count(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failing = Failing(after=1)
    sink = GuardedSink(failing)
    with caplog.at_level(logging.WARNING):
        for number in (1, 2, 3):
            sink.values(step(number))
        sink.metrics(3, {"loss": 1.0, "grad_norm": 2.0})
    assert failing.taken == [1]
    assert failing.calls == 1 + 3  # the first step, and three attempts at the second
    assert sink.lost == 2 * len(step(2)) + 2
    assert isinstance(sink.error, OSError)
    assert len(caplog.records) == 1
    assert "failing" in caplog.text
    assert "No space left" in caplog.text


def test_an_unwritable_store_counts_what_it_held(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (parquet,) = build(["parquet"], tmp_path, METADATA)
    (tmp_path / "telemetry").write_text("a file where the directory should be")
    sink = GuardedSink(parquet)
    sink.values(step(1))
    sink.values(step(2))
    sink.flush()
    sink.values(step(3))
    assert sink.lost == 3 * len(step(1))
    assert len([r for r in caplog.records if "switched off" in r.message]) == 1
