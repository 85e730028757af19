"""Sinks: what they write, and that a failing one neither stops the training nor stays unnoticed."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_fp8_recipes.errors import ConfigError, ReportError, RunDirectoryError
from nemo_fp8_recipes.telemetry import store
from nemo_fp8_recipes.telemetry.alerts.alert import Alert
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


def test_tensorboard_makes_the_events_of_many_steps_together(tmp_path: Path) -> None:
    (sink,) = build(["tensorboard"], tmp_path, METADATA)
    sink.metrics(1, {"loss": 5.5, "grad_norm": 1.0})
    sink.values(step(1, window=3))
    assert sink.unwritten() == 2 + len(step(1, window=3))
    assert not (tmp_path / "tensorboard").exists()
    sink.flush()
    assert sink.unwritten() == 0
    assert scalars(tmp_path / "tensorboard")["train/loss"] == {1: 5.5}
    # A run that never flushes, because it quantises nothing, keeps no more than a few.
    for number in range(2, 200):
        sink.metrics(number, {"loss": float(number)})
    assert sink.unwritten() <= 64
    sink.close()
    assert scalars(tmp_path / "tensorboard")["train/loss"] == {1: 5.5, **{n: float(n) for n in range(2, 200)}}


def test_tensorboard_that_cannot_be_written_loses_what_waits_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tensorboard").write_text("a file where the directory belongs")
    guarded = GuardedSink(build(["tensorboard"], tmp_path, METADATA)[0])
    guarded.metrics(1, {"loss": 5.5})
    guarded.values(step(1))
    assert guarded.error is None
    guarded.flush()
    assert guarded.lost == 1 + len(step(1))
    guarded.metrics(2, {"loss": 5.5})
    assert guarded.lost == 2 + len(step(1))
    assert "tensorboard is switched off" in caplog.text


def test_tensorboard_tells_steps_of_the_same_series_apart(tmp_path: Path) -> None:
    (sink,) = build(["tensorboard"], tmp_path, METADATA)
    few, many = step(1, layers=1).series, step(1, layers=2).series
    written = [
        StepValues(number, names, np.asarray([number + i / 1024 for i in range(len(names))], np.float32))
        for number, names in ((1, few), (2, many), (3, few), (4, many), (5, many))
    ]
    for values in written:
        sink.values(values)
    sink.close()
    found = scalars(tmp_path / "tensorboard")
    for values in written:
        for name, value in zip(values.series, values.values, strict=True):
            assert found[name.tag][values.step] == float(value)
    assert list(found[few[0].tag]) == [1, 2, 3, 4, 5]
    assert list(found[many[-1].tag]) == [2, 4, 5]


def test_series_of_one_name_share_a_scalar(tmp_path: Path) -> None:
    (sink,) = build(["tensorboard"], tmp_path, METADATA)
    names = (Series("m", "input", "amax", "delayed", "e4m3"), Series("m", "input", "amax", "mxfp8", "e4m3"))
    for number in (1, 2):
        sink.values(StepValues(number, names, np.asarray([number, number + 10], np.float32)))
    sink.close()
    assert scalars(tmp_path / "tensorboard") == {names[0].tag: {1: 11.0, 2: 12.0}}


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


ALERT = Alert(
    1, "saturation", "warn", "clipped: raise the margin", "m", "input", 4.0, (("m", "input"), ("n", "input"))
)


def alerted(number: int) -> StepValues:
    return dataclasses.replace(step(number), alerts=(dataclasses.replace(ALERT, step=number),))


def test_alerts_are_in_every_sink(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sinks = build(["parquet", "tensorboard", "jsonl"], tmp_path, METADATA)
    for sink in sinks:
        sink.values(step(1))
        sink.values(alerted(2))
    # Alerts do not wait for a flush.
    assert store.read_alerts(tmp_path) == [dataclasses.replace(ALERT, step=2)]
    for sink in sinks:
        sink.close()
    assert scalars(tmp_path / "tensorboard")["alerts/saturation"] == {2: 2.0}
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    (text,) = accumulator.Tensors("alerts/saturation/text")
    assert (text.step, text.tensor_proto.string_val) == (2, [b"clipped: raise the margin"])
    lines = (tmp_path / "telemetry" / "values.jsonl").read_text().splitlines()
    assert "alerts" not in json.loads(lines[0])
    assert json.loads(lines[1])["alerts"] == [
        dataclasses.replace(ALERT, step=2).to_dict() | {"tensors": [["m", "input"], ["n", "input"]]}
    ]


def test_alerts_after_the_step_a_run_resumes_from_are_forgotten(tmp_path: Path) -> None:
    (sink,) = build(["parquet"], tmp_path, METADATA)
    for number in (1, 2, 3):
        sink.values(alerted(number))
    sink.truncate_after(2)
    assert [alert.step for alert in store.read_alerts(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{half", "alerts.jsonl is damaged: a line of it is no JSON"),
        ('{"step": 2}', "line 2 is no alert"),
        ("[]", "line 2 is no alert"),
    ],
)
def test_a_damaged_file_of_alerts_is_named(tmp_path: Path, line: str, says: str) -> None:
    (sink,) = build(["parquet"], tmp_path, METADATA)
    sink.values(alerted(1))
    with (tmp_path / "telemetry" / "alerts.jsonl").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ReportError, match=says) as raised:
        store.read_alerts(tmp_path)
    assert "Error(" not in str(raised.value)


class LightningLogger:
    """Has what Lightning's Logger promises and this needs."""

    def __init__(self) -> None:
        self.calls: list[tuple[dict[str, float], int | None]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.calls.append((metrics, step))


def test_a_lightning_logger_gets_one_call_a_step() -> None:
    logger = LightningLogger()
    (sink,) = build([logger], Path(), {})
    sink.metrics(1, {"loss": 1.0})  # the trainer logs these itself
    sink.values(step(1))
    sink.values(alerted(2))
    sink.close()
    assert [at for _, at in logger.calls] == [1, 2]
    values = step(2)
    assert logger.calls[1][0] == {
        **{name.tag: float(value) for name, value in zip(values.series, values.values, strict=True)},
        "alerts/saturation": 2.0,
    }


def test_a_summary_writer_of_the_job_gets_one_event_a_step_and_stays_open(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path))
    events = []
    add = writer.file_writer.add_summary
    writer.file_writer.add_summary = lambda *given: (events.append(given[1]), add(*given))
    (sink,) = build([writer], Path(), {})
    sink.values(alerted(1))
    sink.close()
    writer.add_scalar("mine", 3.0, 2)
    writer.close()
    assert events == [1, 2]
    found = scalars(tmp_path)
    assert found["mine"] == {2: 3.0}
    assert found[step(1).series[0].tag] == {1: float(step(1).values[0])}
    assert found["alerts/saturation"] == {1: 2.0}


class WandbRun:
    """Has what a W&B run promises and this needs."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, Any]] = []

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.calls.append(("define", name, step_metric))

    def log(self, data: dict[str, float], commit: bool = True) -> None:
        self.calls.append(("log", data, commit))

    def alert(self, title: str, text: str, level: str) -> None:
        self.calls.append(("alert", title, text))

    def finish(self) -> None:
        self.calls.append(("finish", None, None))


def test_a_wandb_run_of_the_job_keeps_its_own_steps() -> None:
    run = WandbRun()
    (sink,) = build([run], Path(), {})
    sink.metrics(1, {"loss": 1.0})
    sink.values(step(1))
    sink.values(alerted(2))
    sink.close()
    logged = [call for call in run.calls if call[0] == "log"]
    assert [(data["fp8/step"], commit) for _, data, commit in logged] == [(1, False), (2, False)]
    assert ("define", "fp8/*", "fp8/step") in run.calls
    assert ("alert", "FP8 saturation", "step 2: clipped: raise the margin") in run.calls
    assert all(call[0] != "finish" for call in run.calls)


def test_two_processes_do_not_write_one_store(tmp_path: Path) -> None:
    """The second is refused while the first lives, and let in when it was killed."""
    program = [
        sys.executable,
        "-c",
        "import sys; from pathlib import Path; from nemo_fp8_recipes.telemetry.sinks import build\n"
        "build(['parquet'], Path(sys.argv[1]), {}); print('writing', flush=True); sys.stdin.read()",
        str(tmp_path),
    ]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "writing\n"
        with pytest.raises(RunDirectoryError, match=f"Another process writes telemetry to {tmp_path}"):
            build(["parquet"], tmp_path, METADATA)
        first.kill()
    (sink,) = build(["parquet"], tmp_path, METADATA)
    sink.values(step(1))
    sink.close()
    sink.close()
    assert store.steps(tmp_path) == (1, 1)


def test_a_wandb_alert_is_raised_once_though_the_call_is_tried_again() -> None:
    class Unreachable(WandbRun):
        def log(self, data: dict[str, float], commit: bool = True) -> None:
            super().log(data, commit)
            if len([call for call in self.calls if call[0] == "log"]) in (1, 2, 4):
                raise ConnectionError("no answer")

    def raised() -> list[str]:
        return [text.partition(":")[0] for kind, _, text in run.calls if kind == "alert"]

    run = Unreachable()
    sink = GuardedSink(build([run], Path(), {})[0])
    sink.values(alerted(2))
    sink.values(alerted(4))
    assert sink.error is None
    assert raised() == ["step 2", "step 4"]
    # Training goes on from step 3: what it comes to again is news.
    sink.truncate_after(3)
    sink.values(alerted(4))
    assert raised() == ["step 2", "step 4", "step 4"]


def test_megatrons_writers_are_found_where_megatron_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    run = WandbRun()
    training, found = types.ModuleType("megatron.training"), types.ModuleType("megatron.training.global_vars")
    found.get_tensorboard_writer = lambda: None  # type: ignore[attr-defined]  # a module made by hand
    found.get_wandb_writer = lambda: run  # type: ignore[attr-defined]  # likewise
    training.global_vars = found  # type: ignore[attr-defined]  # likewise
    monkeypatch.setitem(sys.modules, "megatron.training", training)
    monkeypatch.setitem(sys.modules, "megatron.training.global_vars", found)
    (sink,) = build(["megatron"], Path(), {})
    sink.values(step(1))
    assert [call[1]["fp8/step"] for call in run.calls if call[0] == "log"] == [1]
    found.get_wandb_writer = lambda: None  # type: ignore[attr-defined]  # likewise
    (nowhere,) = build(["megatron"], Path(), {})
    with pytest.raises(ConfigError, match="no writer on this rank"):
        nowhere.values(step(1))


def test_an_object_that_is_no_sink_is_refused() -> None:
    with pytest.raises(ConfigError, match="int is no sink"):
        build([3], Path(), {})


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


FULL_DISK = """
import json, logging, resource, sys
from pathlib import Path
from nemo_fp8_recipes.telemetry.sinks import GuardedSink, build
from nemo_fp8_recipes.telemetry.store import StoreWriter
from tests.telemetry.examples import METADATA, step

warnings = []
handler = logging.Handler()
handler.emit = lambda record: warnings.append(record.getMessage())
logging.getLogger("nemo_fp8_recipes").addHandler(handler)
run_dir = Path(sys.argv[1])
sinks = [GuardedSink(sink) for sink in build(["parquet", "tensorboard", "jsonl"], run_dir, METADATA)]
for number in range(1, 61):
    if number == 21:  # from here on no file may grow beyond this
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    for sink in sinks:
        sink.values(step(number, layers=40))
        if number % 10 == 0:
            sink.flush()
for sink in sinks:
    sink.close()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(json.dumps({"lost": {sink.name: sink.lost for sink in sinks}, "warnings": warnings}))
"""


def test_a_full_disk_switches_sinks_off_and_the_run_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout)
    a_step = len(step(1, layers=40))
    assert seen["lost"]["parquet"] == seen["lost"]["jsonl"] == 40 * a_step
    assert seen["lost"]["tensorboard"] > 0
    for name in ("parquet", "jsonl"):
        about = [line for line in seen["warnings"] if f"sink {name} " in line]
        assert "is switched off after 3 attempts: OSError" in about[0]
        assert about[1:] == [line for line in about[1:] if line.startswith(f"Telemetry sink {name} lost")]
        assert len(about) == 2
    # What was written before is whole, and nothing half-written is left.
    assert store.steps(tmp_path) == (1, 20)
    assert store.read(tmp_path).num_rows == 20 * a_step
    assert not list((tmp_path / "telemetry").glob(".*"))
    lines = (tmp_path / "telemetry" / "values.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 21))
