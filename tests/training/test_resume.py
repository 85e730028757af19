"""Stopping and going on: the same losses, the same amax and scales, from whatever ended the run before."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_fp8_recipes.telemetry import store
from tests.training.command import Run, command, environment, train

STEPS = 30
# The schedule, and with it every step, depends on the number of steps: all runs here share it.
DELAYED = ("fp8_recipe=delayed", "fp8_recipe.amax_history_len=8", f"training.steps={STEPS}")


def numbers(run: Run) -> list[dict]:
    """The metrics less what depends on the clock."""
    return [{key: value for key, value in row.items() if key != "step_time_ms"} for row in run.metrics]


def final_checkpoint(run: Run) -> dict:
    """Names and digests of the tensors' files in the last checkpoint."""
    marker = json.loads((run.path / "checkpoints" / f"step_{STEPS:06d}" / "complete.json").read_text())
    return {name: entry for name, entry in marker["files"].items() if name.endswith(".distcp")}


def assert_same_run(run: Run, uninterrupted: Run) -> None:
    assert numbers(run) == numbers(uninterrupted)
    assert final_checkpoint(run) == final_checkpoint(uninterrupted)
    tables = [store.read(found.path) for found in (run, uninterrupted)]
    keys = ("step", "module", "tensor", "stat")
    logged, expected = (
        sorted(table.to_pylist(), key=lambda row: [row[key] for key in keys]) for table in tables
    )
    assert len(expected) > STEPS
    assert logged == expected


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tmp_path_factory.mktemp("resume") / "whole", *DELAYED, "training.save_every=10")


def test_sigterm_saves_and_the_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, uninterrupted: Run
) -> None:
    path = tmp_path / "run"
    process = subprocess.Popen(
        command(f"run_dir={path}", *DELAYED, "training.save_every=1000"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = path / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
    stopped = Run(process.returncode, output, errors, path)
    assert stopped.status == 128 + signal.SIGTERM, errors
    assert stopped.record["status"] == "interrupted"
    step = stopped.metrics[-1]["step"]
    assert 3 <= step < STEPS
    assert os.listdir(path / "checkpoints") == [f"step_{step:06d}"]

    # What a later, lost continuation may have logged is forgotten.
    with metrics.open("a") as file:
        file.write(json.dumps({"step": step + 1, "loss": -1.0}) + "\n")
    resumed = train(path, *DELAYED, "training.save_every=1000", resume=True)
    assert f"after step {step} of {STEPS}" in resumed.output
    assert [line for line in resumed.errors.splitlines() if not line.startswith("Alert ")] == []
    assert resumed.record["status"] == "finished"
    assert [found["step"] for found in resumed.record["resumes"]] == [step]
    assert_same_run(resumed, uninterrupted)


KILLED_WHILE_SAVING = """
import os, signal, sys
from nemo_fp8_recipes.training.checkpoint.checkpointer import Checkpointer
complete = Checkpointer._complete
def killed(self, path, position):
    if position.step == int(os.environ["KILLED_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    complete(self, path, position)
Checkpointer._complete = killed
from nemo_fp8_recipes.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_kill_during_a_save_leaves_the_checkpoint_before_it(tmp_path: Path, uninterrupted: Run) -> None:
    """Killed in the first save, auto starts again in the same directory; killed in the second, it goes on
    from the first."""
    path = tmp_path / "run"
    arguments = command(f"run_dir={path}", *DELAYED, "training.resume=auto", "training.save_every=10")[3:]
    for step in ("10", "20"):
        killed = subprocess.run(
            [sys.executable, "-c", KILLED_WHILE_SAVING, *arguments],
            env={**environment(), "KILLED_AT": step},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert ("starts again from its first step" in killed.stdout) == (step == "20")
    assert sorted(os.listdir(path / "checkpoints")) == ["step_000010", "step_000020"]
    assert not (path / "checkpoints" / "step_000020" / "complete.json").exists()
    resumed = train(path, *DELAYED, "training.save_every=10", resume=True)
    assert "after step 10 of" in resumed.output
    assert_same_run(resumed, uninterrupted)
    assert sorted(os.listdir(path / "checkpoints")) == ["step_000020", "step_000030"]


def refused(run: Run, *overrides: str) -> str:
    """The one line with which resuming is refused; the run is left as it was."""
    before = (run.path / "run.json").read_text(), (run.path / "metrics.jsonl").read_text()
    failed = train(run.path, *DELAYED, *overrides, status=2, resume=True)
    assert ((run.path / "run.json").read_text(), (run.path / "metrics.jsonl").read_text()) == before
    assert "Traceback" not in failed.errors
    lines = [line for line in failed.errors.splitlines() if line.startswith("nemo-fp8: ")]
    assert len(lines) == 1
    return lines[0]


def test_another_model_or_recipe_is_refused(uninterrupted: Run) -> None:
    message = refused(uninterrupted, "model.num_layers=4", "fp8_recipe.margin=1")
    assert "fp8_recipe.margin was 0, is 1" in message
    assert "model.num_layers was 2, is 4" in message


def test_a_corrupt_checkpoint_is_refused(uninterrupted: Run) -> None:
    file = max((uninterrupted.path / "checkpoints" / f"step_{STEPS:06d}").glob("*.distcp"))
    content = file.read_bytes()
    try:
        file.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
        message = refused(uninterrupted)
    finally:
        file.write_bytes(content)
    assert f"is corrupt: {file.name} has other content than was saved" in message
