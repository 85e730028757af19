"""The plain Transformer Engine example as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train_plain_te.py"


def test_the_example_trains_and_proves_its_recipe(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "fp8_recipe=blockwise", "fp8_recipe.w_block_scaling_dim=1"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "150"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "blockwise on emulated h100" in done.stdout
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("step ")]
    assert len(losses) == 20
    assert min(losses[-5:]) < losses[0] - 0.5
    assert "7 of 9 modules quantised by blockwise" in done.stdout
    assert list(tmp_path.glob("runs/blockwise-*/telemetry/*.parquet"))
