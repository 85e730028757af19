"""`-m`: several jobs by Hydra's multirun, and what submitit is told of `launcher=slurm`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_fp8_recipes.cli import main
from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.launch.arguments import Payload
from nemo_fp8_recipes.launch.hydra_text import override
from nemo_fp8_recipes.launch.plan import make_job
from nemo_fp8_recipes.launch.slurm.submitit import settings
from nemo_fp8_recipes.launch.slurm.time_limit import minutes
from tests.launch.conftest import HOSTILE, clean_environment, nemo_fp8


def of_submitit(*words: str, hardware: str = "h100") -> dict[str, Any]:
    overrides = ["launcher=slurm", f"hardware={hardware}", "launcher.time=90", *words]
    return settings(make_job(overrides, Payload("train")))


def test_submitit_is_told_what_the_launcher_group_says() -> None:
    found = of_submitit(
        "launcher.account=research",
        "launcher.partition=big",
        "launcher.nodes=4",
        "launcher.cpus_per_task=96",
        "launcher.memory=900G",
        "launcher.exclusive=true",
        "launcher.job_name=compare it",
        "launcher.array_parallel=2",
        "launcher.signal_seconds=600",
        "launcher.sbatch_arguments=['--mail-type=END',--contiguous]",
        "launcher.modules=[cuda]",
        "+launcher.environment.PROBE='$(x)'",
        "training.save_every=10",
    )
    expected = {
        "account": "research",
        "partition": "big",
        "name": "compare it",
        "timeout_min": 90,
        "nodes": 4,
        "tasks_per_node": 1,
        "gpus_per_node": 8,
        "cpus_per_task": 96,
        "signal_delay_s": 600,
        "max_num_timeout": 20,
        "array_parallelism": 2,
    }
    assert {key: found[key] for key in expected} == expected
    more = {"requeue": True, "mem": "900G", "exclusive": True, "mail-type": "END", "contiguous": True}
    signal = {"signal": "B:USR1@${hydra.launcher.signal_delay_s}"}
    assert found["additional_parameters"] == {**more, **signal}
    assert "qos" not in found
    assert "module load cuda" in found["setup"]
    assert "export PROBE='$(x)'" in found["setup"]
    assert any(line.startswith("export NEMO_FP8_RENDEZVOUS_PORT=") for line in found["setup"])
    bare = of_submitit("device=emulated", "launcher.nproc_per_node=2", "launcher.tasks=gpu")
    assert (bare["gpus_per_node"], bare["tasks_per_node"]) == (None, 2)
    assert bare["max_num_timeout"] == 0, "a job that saves nothing has nothing to go on from"


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        (30, 30),
        ("30:01", 31),
        ("04:00:00", 240),
        ("1-12", 36 * 60),
        ("1-12:30", 36 * 60 + 30),
        ("2-00:00:01", 2881),
        ("00:00:10", 1),
    ],
)
def test_time_limits_are_read_as_sbatch_reads_them(time: str | int, expected: int) -> None:
    assert minutes(time) == expected


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["launcher.time=null"], "launcher.time"),
        (["launcher.time=soon"], "launcher.time"),
        (["launcher.container_image=/images/nemo.sqsh"], "launcher.container_image"),
        (["launcher.srun_arguments=['--mpi=none']"], "launcher.srun_arguments"),
        *(
            ([override("launcher.comment", HOSTILE[name])], "launcher.comment")
            for name in ("newline", "single quote", "double quote", "backslash", "quotes and backslashes")
        ),
    ],
)
def test_what_submitit_has_no_place_for_is_refused(words: list[str], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        of_submitit(*words)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fp8_recipe=delayed,mxfp8", "hardware=h100"], "mxfp8"),
        (["fp8_recipe=delayed,tensorwise", "training.stepz=1"], "Did you mean 'steps'?"),
        (["fp8_recipe=delayed,tensorwise", "run_dir=x"], "is one directory, and there are 2 jobs"),
        (["fp8_recipe=delayed,tensorwise", "launcher=slurm"], "Add hydra/launcher=submitit_slurm"),
        (["fp8_recipe=delayed", "launcher=torchrun", "hydra/launcher=submitit_slurm"], "launcher=slurm"),
        (["training.seed=1,2", "launcher.hang_timeout_minutes=1,2"], "share launcher"),
        (["training.seed=1,2", "--resume"], "takes no --resume"),
    ],
)
def test_nothing_starts_when_one_of_the_jobs_cannot(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["train", "-m", *words]) == 2
    assert said in capsys.readouterr().err
    assert os.listdir(in_tmp) == []


def test_it_is_a_hydra_application(in_tmp: Path) -> None:
    pytest.importorskip("submitit", reason="needs the extra submitit")
    words = ("train", "-m", "fp8_recipe=cs", "hydra/launcher=submitit_slurm", "launcher.time=1-00")
    words += ("launcher.partition=big", "launcher.nodes=2", "hydra.launcher.nodes=3", "hardware=h100")
    done = subprocess.run(
        nemo_fp8(*words, "--cfg", "hydra"),
        cwd=in_tmp,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    shown = yaml.safe_load(done.stdout)["hydra"]
    launcher = shown["launcher"]
    assert launcher["_target_"].endswith("submitit_launcher.SlurmLauncher")
    assert (launcher["partition"], launcher["timeout_min"], launcher["gpus_per_node"]) == ("big", 1440, 8)
    assert launcher["nodes"] == 3  # Hydra's own key wins
    assert "fp8_recipe=tensorwise" in shown["overrides"]["task"]
    assert os.listdir(in_tmp) == []


STOOD_IN = """
import json, sys
from nemo_fp8_recipes import cli
from nemo_fp8_recipes.launch import local

def run(job, typed, *, resume, overwrite):
    arguments = job.train_arguments(resume=resume)
    with open(f"{job.run_dir.name}.json", "w") as file:
        json.dump([job.id, str(job.run_dir), job.recipe.name, arguments, typed], file)
    record = {"schema_version": 1, "status": "finished", "recipe": {}, "started": "2026-01-01T00:00:00+00:00"}
    (job.run_dir / "run.json").write_text(json.dumps({**record, "result": {"last_loss": 2.0}}))
    return 3 if job.recipe.name == "bf16" else 0

local.run = run
sys.exit(cli.main(sys.argv[1:]))
"""


def test_each_job_is_launched_with_its_own_overrides_and_run_directory(in_tmp: Path) -> None:
    """By Hydra's own launcher, one after the other; what runs in the jobs is stood in for."""

    def sweep(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", STOOD_IN, "train", "-m", *words],
            cwd=in_tmp,
            env=clean_environment(),
            capture_output=True,
            text=True,
            timeout=120,
        )

    done = sweep("fp8_recipe=ds,cs", "+launcher.environment.PROBE='$(x) {a,b}'", "hydra.sweep.dir=my runs")
    assert done.returncode == 0, done.stderr
    launched = [json.loads(path.read_text()) for path in sorted(in_tmp.glob("*.json"))]
    assert [name for _, _, name, _, _ in launched] == ["delayed", "tensorwise"]
    for number, (job_id, run_dir, name, arguments, typed) in enumerate(launched):
        assert job_id.endswith(f"_{number}")
        assert run_dir == f"{in_tmp}/my runs/{name}-{job_id}"
        assert arguments[-1] == f"run_dir='{run_dir}'"
        assert arguments[:2] == [f"fp8_recipe={name}", "+launcher.environment.PROBE='$(x) {a,b}'"]
        assert typed == ["nemo-fp8", "train", *arguments[:2]]
        assert yaml.safe_load((Path(run_dir) / ".hydra/overrides.yaml").read_text()) == arguments[:2]
    failed = sweep("fp8_recipe=tensorwise,bf16")
    assert failed.returncode == 1
    assert "ended with exit status 3" in failed.stderr
