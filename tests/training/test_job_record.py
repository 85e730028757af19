"""The end of a job, as its run directory and its terminal tell it."""

from __future__ import annotations

import io
import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from rich.console import Console

from nemo_fp8_recipes.config import compose
from nemo_fp8_recipes.training import job_record as job_records
from nemo_fp8_recipes.training.data import Dataset
from nemo_fp8_recipes.training.invocation import Invocation
from nemo_fp8_recipes.training.job_record import End, GoingOn, JobRecord
from nemo_fp8_recipes.training.metrics import MetricsLog
from nemo_fp8_recipes.training.run_directory import RunDirectory
from nemo_fp8_recipes.training.settings import read_settings
from tests.training.test_run_directory import START


def job_record(
    run: RunDirectory, *overrides: str, going_on: GoingOn | None = None
) -> tuple[io.StringIO, JobRecord]:
    """Of a job of two steps, and what it says in the terminal."""
    words = ["fp8_recipe=mxfp8", "training.steps=2", "training.save_every=1", *overrides]
    said = io.StringIO()
    invocation = Invocation([], [], "", {}, "emulated b200", emulated=True)
    settings = read_settings(compose(words))
    return said, JobRecord(settings, invocation, Console(file=said, width=400), run.path, going_on, run)


@pytest.mark.parametrize("stopped", [0, signal.SIGTERM])
def test_a_damaged_telemetry_file_does_not_make_the_job_a_failed_one(tmp_path: Path, stopped: int) -> None:
    """It went as it went, whether or not its summary can be shown."""
    run = RunDirectory.create(tmp_path / "run", "mxfp8")
    run.start(**START)
    (run.path / "telemetry").mkdir()
    damaged = run.path / "telemetry" / "steps-0000000001-0000000002.parquet"
    damaged.write_bytes(b"")
    said, record = job_record(run)
    end = End(1 if stopped else 2, signal=stopped)
    record.end(end)
    run.close()
    assert f"{damaged} is damaged" in said.getvalue()
    assert "nemo-fp8 report" in said.getvalue()  # where everything lies is still said
    assert json.loads((run.path / "run.json").read_text())["status"] == (
        "interrupted" if stopped else "finished"
    )
    assert end.status == (143 if stopped else 0)


def test_damaged_metrics_do_not_make_a_job_that_reached_its_last_step_a_failed_one(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", "mxfp8")
    run.start(**START)
    run.metrics_file.write_text('no step\n{"step": 2, "loss": 1.0}\n')
    said, record = job_record(run)
    with record.failing():
        record.end(End(2, held_out=3.0))
    run.close()
    told = json.loads((run.path / "run.json").read_text())
    assert told["status"] == "finished"
    assert told["result"] == {"steps": 2, "first_loss": None, "last_loss": None, "held_out_loss": 3.0}
    assert f"{run.metrics_file} is damaged: line 1" in said.getvalue()


@pytest.mark.parametrize(
    ("logged", "log_every", "start", "ends"),
    [
        ([1, 2, 3, 4, 5, 6, 7], 1, 6, None),
        ([1, 10, 20], 10, 29, None),
        ([1, 10, 20], 1, 29, None),  # every tenth step when it was logged
        ([], 10, 0, None),
        ([1, 2, 3], 1, 6, 3),
        ([], 1, 6, 0),
        ([1, 10], 10, 29, 10),
        ([1], 10, 50, 1),  # or every hundredth step when it was logged: nothing shows which
    ],
)
def test_metrics_that_are_not_there_are_missed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    logged: list[int],
    log_every: int,
    start: int,
    ends: int | None,
) -> None:
    monkeypatch.setattr(job_records, "agree", lambda work: work())  # of one process
    run = RunDirectory.create(tmp_path / "run", "mxfp8")
    run.start(**START)
    for step in logged:
        MetricsLog(run.metrics_file).append({"step": step})
    said, record = job_record(run, f"training.log_every={log_every}", going_on=GoingOn(start, None))
    record.begin()
    record.show_banner(cast("Dataset", SimpleNamespace(name="mock", description="")), processes=1)
    run.close()
    assert ("metrics.jsonl" in said.getvalue()) == (ends is not None)
    assert ends is None or (
        f"metrics.jsonl ends at step {ends}, and the run goes on after {start}: what was logged between is "
        "gone, unless training.log_every was larger then." in said.getvalue()
    )
