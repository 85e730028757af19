"""A training job that is killed again and again ends with the telemetry of one that was left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from nemo_fp8_recipes.telemetry import store
from tests.training.command import command, environment, train

STEPS = 24
JOB = (
    "fp8_recipe=tensorwise",
    f"training.steps={STEPS}",
    "training.save_every=4",
    "telemetry.stats_every=3",
    "telemetry.flush_every=3",
    "telemetry.whatif=['*.layers.0.*/input','*.layers.1.mlp.*/grad_output','*linear_proj/weight']",
)
KEY = ("step", "module", "tensor", "stat", "recipe", "format")


def rows(run_dir: Path) -> dict[tuple[Any, ...], Any]:
    """Every row of a store, the values by their bits."""
    found: dict[tuple[Any, ...], Any] = {}
    for row in store.read(run_dir).to_pylist():
        key = tuple(row[name] for name in KEY)
        assert key not in found, key
        value = row["value"] if row["values"] is None else row["values"]
        found[key] = repr(value)
    return found


def test_kills_at_any_moment_change_no_row(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", *JOB)
    expected = rows(whole.path)
    judged = {
        key for key in expected if key[3].startswith("whatif/delayed/") and not key[3].endswith("by_rank")
    }
    assert len(judged) > 100

    path, chance, kills = tmp_path / "killed", random.Random(7), 0
    metrics = path / "metrics.jsonl"
    while True:
        process = subprocess.Popen(
            command(f"run_dir={path}", *JOB, "training.resume=auto"),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        # Killed some steps after it goes on, wherever it is then; left alone the fourth time.
        start = metrics.read_text().count("\n") if metrics.exists() else 0
        wanted = start + chance.randint(2, 9) if kills < 3 else 10**9
        deadline = time.monotonic() + 200
        changed = os.path.getmtime(metrics) if metrics.exists() else 0.0
        while process.poll() is None and time.monotonic() < deadline:
            begun = metrics.exists() and os.path.getmtime(metrics) > changed
            if kills < 3 and begun and metrics.read_text().count("\n") >= min(wanted, STEPS - 1):
                time.sleep(chance.uniform(0, 0.1))
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        _, errors = process.communicate(timeout=200)
        if process.returncode == -signal.SIGKILL:
            kills += 1
            # Readable as it lies there: no row twice, and nothing that the other job does not have.
            assert rows(path).items() <= expected.items()
            continue
        assert process.returncode == 0, errors[-3000:]
        break
    assert kills == 3
    assert rows(path) == expected
