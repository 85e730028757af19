"""Sweeps of whole training jobs: an array on the real SLURM through Hydra's submitit launcher, and one after
the other."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.launch.conftest import clean_environment, nemo_fp8
from tests.launch.slurm_cluster import Cluster
from tests.launch.slurm_jobs import LONG, STEPS_OF_LONG, logged_steps, losses, record, runs, until

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_an_array_of_three_recipes_one_of_which_is_requeued_before_its_time_limit(
    cluster: Cluster, in_tmp: Path, uninterrupted: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit", reason="needs the extra submitit")
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    words = ("fp8_recipe=delayed,tensorwise,blockwise", *(word for word in LONG if "fp8_recipe" not in word))
    settings = ("launcher.time=10", "launcher.nproc_per_node=1", "device=emulated", "hardware=h100")
    process = subprocess.Popen(
        nemo_fp8("train", "-m", *words, *settings, "hydra/launcher=submitit_slurm"),
        cwd=in_tmp,
        env={**clean_environment(), **{key: cluster.environment[key] for key in ("SLURM_CONF", "PATH")}},
        stdout=(in_tmp / "said").open("w"),
        stderr=subprocess.STDOUT,
    )

    def run_dir(recipe: str) -> Path:
        return next(iter((in_tmp / "runs").glob(f"{recipe}-*")), in_tmp / "none")

    try:
        until(lambda: logged_steps(run_dir("delayed")) >= 3, 180, "no steps")
        first = run_dir("delayed")
        job_id = first.name.partition("-")[2]
        assert job_id.endswith("_0")
        cluster.run("scancel", "--batch", "--signal=USR1", job_id)  # as SLURM does before the limit
        cluster.wait(job_id, "PENDING", seconds=90)
        saved = max(losses(first))
        assert 3 <= saved < STEPS_OF_LONG
        assert runs(first)["state"] == "queued"
        cluster.start_again(job_id)
        assert process.wait(300) == 0, (in_tmp / "said").read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
            cluster.run("scancel", "-u", "root")
    assert losses(first) == uninterrupted
    assert record(first)["resumes"][0]["step"] == saved
    for index, recipe in enumerate(("delayed", "tensorwise", "blockwise")):
        path = run_dir(recipe)
        assert path.name.endswith(f"_{index}")
        assert (record(path)["status"], record(path)["recipe"]["name"]) == ("finished", recipe)
        (node,) = (json.loads(file.read_text()) for file in (path / ".launch/nodes").iterdir())
        assert node["attempt"] == (2 if recipe == "delayed" else 1)
        assert runs(path)["state"] == "finished"
    assert sorted(path.name for path in in_tmp.iterdir()) == ["runs", "said"]


def test_recipes_one_after_the_other_each_in_its_own_run_directory(in_tmp: Path) -> None:
    sizes = ("model.num_layers=1", "model.hidden_size=64", "model.ffn_hidden_size=128", "model.seq_length=32")
    words = ("data=mock", "training.steps=1", "training.eval_batches=0", "telemetry.enabled=false")
    done = subprocess.run(
        nemo_fp8("train", "-m", "fp8_recipe=delayed,cs", "device=emulated", *sizes, *words),
        cwd=in_tmp,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    runs = sorted(path for path in (in_tmp / "runs").iterdir() if path.is_dir())
    assert [path.name.split("-")[0] for path in runs] == ["delayed", "tensorwise"]
    assert [path.name[-2:] for path in runs] == ["_0", "_1"]
    assert sorted(os.listdir(in_tmp)) == ["runs"]
    for path in runs:
        record = json.loads((path / "run.json").read_text())
        assert (record["status"], record["recipe"]["name"]) == ("finished", path.name.split("-")[0])
        assert yaml.safe_load((path / ".hydra/overrides.yaml").read_text())
        assert json.loads((path / ".launch/job.json").read_text())["launcher"] == "local"
