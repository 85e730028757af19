"""The example runs as a user would run it, and its manifest says what it claims."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "pretrain_megatron_core.py"
SMALL = ["model.num_layers=1", "model.hidden_size=64", "model.ffn_hidden_size=128", "model.seq_length=32"]


def run_example(directory: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *SMALL, *overrides],
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_example_trains_and_proves_its_recipe(tmp_path: Path) -> None:
    done = run_example(tmp_path, "fp8_recipe=tensorwise", "fp8_recipe.use_power_2_scales=true")
    assert done.returncode == 0, done.stderr
    assert "tensorwise on emulated h100" in done.stdout
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("step ")]
    assert len(losses) == 20
    assert min(losses[-5:]) < losses[0] - 0.5
    assert "4 of 6 modules quantised by tensorwise" in done.stdout
    assert list((tmp_path / "runs" / "example-megatron-core" / "telemetry").glob("*.parquet"))


def test_the_example_refuses_hardware_that_cannot_run_its_recipe(tmp_path: Path) -> None:
    done = run_example(tmp_path, "fp8_recipe=mxfp8", "hardware=h100")
    assert done.returncode != 0
    assert "mxfp8" in done.stderr
    assert "10.0" in done.stderr
    assert not list(tmp_path.iterdir())
