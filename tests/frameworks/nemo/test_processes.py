"""Whole commands in processes of their own: the example as it stands, tensor and pipeline parallelism."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nemo_fp8_recipes.report import run as report
from nemo_fp8_recipes.telemetry import store
from tests.support.processes import environment

ROOT = Path(__file__).parents[3]


def command(arguments: list[str], cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_the_example_runs_as_it_stands(tmp_path: Path) -> None:
    said = command([str(ROOT / "examples" / "pretrain_nemo.py"), "fp8_recipe=blockwise"], tmp_path)
    assert "blockwise on emulated" in said
    assert store.read(tmp_path / "runs" / "example-nemo").num_rows
    assert (tmp_path / "runs" / "example-nemo" / "manifest.json").is_file()


@pytest.mark.parametrize("parallel", ["tp", "pp"])
def test_two_processes_are_the_same_job(parallel: str, tmp_path: Path) -> None:
    job = ["train", "device=emulated", "fp8_recipe=delayed", "data=mock", "training.steps=3"]
    job += ["model.num_layers=4", "training.eval_batches=0", "telemetry.log_every=1"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "nemo_fp8_recipes"]
    for framework in ("nemo", "megatron_core"):
        run_dir = f"run_dir={tmp_path / framework}"
        command([*torchrun, *job, f"framework={framework}", f"parallel.{parallel}=2", run_dir], tmp_path)
    ours, theirs = report.load(tmp_path / "megatron_core"), report.load(tmp_path / "nemo")
    assert [loss for _, loss in theirs.losses] == pytest.approx([loss for _, loss in ours.losses], rel=1e-6)
    assert theirs.manifest == ours.manifest
    assert len(theirs.manifest.quantized()) == 4 * 4
    tables = [store.read(tmp_path / name).to_pylist() for name in ("megatron_core", "nemo")]
    assert tables[0] == tables[1]
