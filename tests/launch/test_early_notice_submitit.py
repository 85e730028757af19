"""SLURM's notice in the first moments of a job of Hydra's submitit launcher: before its step is started, and
while its Python starts."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.launch.conftest import clean_environment, nemo_fp8
from tests.launch.slurm_jobs import SMALL

pytestmark = pytest.mark.slow

SWEEP = (
    "fp8_recipe=delayed",
    *SMALL,
    "training.steps=2",
    "training.save_every=1",
    "telemetry.enabled=false",
    "device=emulated",
    "hardware=h100",
    "launcher.time=60",
    "launcher.nproc_per_node=1",
    "launcher.tasks=gpu",
    "launcher.pre_commands=['. $MOMENT']",
    "hydra/launcher=submitit_slurm",
)

SBATCH = """#!/bin/sh
cp "$1" script.tmp && mv script.tmp script
echo Submitted batch job 7
"""
# Stands in for srun: runs the task itself, as the only one, and before that what the test says.
SRUN = """#!/bin/bash
while [ "${1#--}" != "$1" ]; do
  case "$1" in --output|--error) shift;; esac
  shift
done
. ./task
exec "$@"
"""


@pytest.fixture(scope="module")
def submitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the batch script that submitit wrote, and with stand-ins for SLURM's programs."""
    pytest.importorskip("submitit", reason="needs the extra submitit")
    directory = tmp_path_factory.mktemp("submitit")
    tools = directory / "tools"
    tools.mkdir()
    (tools / "sbatch").write_text(SBATCH)
    (tools / "srun").write_text(SRUN)
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {directory}/requeued\n')
    (tools / "sacct").write_text("#!/bin/sh\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    environment = {**clean_environment(), "PATH": f"{tools}:{os.environ['PATH']}"}
    with (directory / "said").open("w") as said:
        process = subprocess.Popen(
            nemo_fp8("train", "-m", *SWEEP),
            cwd=directory,
            env=environment,
            stdout=said,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 120
        pickled = directory / "runs/.submitit/7"
        while not ((directory / "script").exists() and list(pickled.glob("*submitted.pkl"))):
            assert process.poll() is None, (directory / "said").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        process.kill()  # it would wait for the job's results
        process.wait()
    return directory


def run(directory: Path, *, setup: str = "", task: str = "", restarts: int | None = None) -> int:
    """Run the batch script as SLURM would; the exit status."""
    (directory / "moment").write_text(setup)
    (directory / "task").write_text(task)
    of_slurm = {
        "JOB_ID": "7",
        "JOB_NUM_NODES": "1",
        "NODEID": "0",
        "PROCID": "0",
        "LOCALID": "0",
        "NTASKS": "1",
        **({"RESTART_COUNT": str(restarts)} if restarts is not None else {}),
    }
    environment = {
        **clean_environment(),
        "PATH": f"{directory / 'tools'}:{os.environ['PATH']}",
        "MOMENT": str(directory / "moment"),
        **{f"SLURM_{name}": value for name, value in of_slurm.items()},
    }
    done = subprocess.run(
        ["bash", "script"], cwd=directory, env=environment, text=True, capture_output=True, timeout=240
    )
    print(done.stdout, done.stderr)
    return done.returncode


def test_a_notice_in_its_first_moments_sends_the_job_back_and_it_goes_on(submitted: Path) -> None:
    assert "#SBATCH --signal=B:USR1@300\n" in (submitted / "script").read_text()
    requeued = submitted / "requeued"
    # Before its step was started, where submitit would have lost the signal.
    assert run(submitted, setup="kill -USR1 $$", task="touch started") == 143
    assert requeued.read_text() == "requeue 7\n"
    assert not (submitted / "started").exists()
    # While its Python starts, which the signal would have ended.
    assert run(submitted, task='kill -USR1 "$PPID"; sleep 0.5', restarts=1) != 0
    assert requeued.read_text().splitlines() == ["requeue 7", "requeue 7"]
    (run_dir,) = (submitted / "runs").glob("delayed-*")
    assert not (run_dir / "run.json").exists()
    assert run(submitted, restarts=2) == 0
    assert json.loads((run_dir / "run.json").read_text())["status"] == "finished"
    assert len(requeued.read_text().splitlines()) == 2
    assert not list((submitted / "runs/.submitit").glob("notice*"))


def test_a_job_that_was_sent_back_often_enough_ends(submitted: Path) -> None:
    requeued = submitted / "requeued"
    requeued.unlink(missing_ok=True)
    assert run(submitted, setup="kill -USR1 $$", restarts=20) == 143
    assert not requeued.exists()
