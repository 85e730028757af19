"""Jobs that tests submit to the real SLURM, and what they look at afterwards."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_fp8_recipes.cli import main

# A model that takes a fraction of a second a step.
SMALL = (
    "model.num_layers=1",
    "model.hidden_size=64",
    "model.ffn_hidden_size=128",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.seq_length=32",
    "data=mock",
    "training.micro_batch_size=1",
    "training.global_batch_size=4",
    "training.eval_batches=0",
)


STEPS_OF_LONG = 120
LONG = (
    "fp8_recipe=delayed",
    *SMALL,
    f"training.steps={STEPS_OF_LONG}",
    "training.save_every=1000",
    "telemetry.enabled=false",
)


def record(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "run.json").read_text())


def losses(run_dir: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


def runs(run_dir: Path) -> dict[str, Any]:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert main(["runs", "--json", str(run_dir)]) == 0
    (row,) = json.loads(output.getvalue())["runs"]
    return row


def until(condition: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def logged_steps(run_dir: Path) -> int:
    try:
        return (run_dir / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0
