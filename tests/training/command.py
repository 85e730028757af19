"""Whole `nemo-fp8 train` commands in their own processes, on a model small enough to take seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT = 240  # seconds; a command takes about ten

# Every dimension a multiple of 32, as MXFP8 needs.
SMALL = (
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.ffn_hidden_size=128",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.seq_length=32",
    "training.eval_batches=0",
    "telemetry.log_every=1",
)
SMALL_DATA = ("data.max_bytes=400000", "data.held_out_every=8")  # of the default data
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Run:
    """What a finished command left: its output and its run directory."""

    status: int
    output: str
    errors: str
    path: Path

    @property
    def record(self) -> dict[str, Any]:
        return json.loads((self.path / "run.json").read_text())

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.metrics]


def command(*overrides: str, ranks: int = 1) -> list[str]:
    program = [sys.executable, "-m", "nemo_fp8_recipes"]
    if ranks > 1:
        program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        program += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "nemo_fp8_recipes"]
    data = () if any(word.startswith("data=") for word in overrides) else SMALL_DATA
    return [*program, "train", *SMALL, *data, *overrides]


def environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    return {**inherited, "OMP_NUM_THREADS": "1", "COLUMNS": "150"}


def train(path: Path, *overrides: str, ranks: int = 1, status: int = 0, resume: bool = False) -> Run:
    """Run the command with its run directory at `path` and check its exit status."""
    where = f"training.resume={path}" if resume else f"run_dir={path}"
    device = ["device=emulated"] if ranks > 1 else []
    done = subprocess.run(
        command(where, *device, *overrides, ranks=ranks),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == status, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return Run(done.returncode, done.stdout, done.stderr, path)
