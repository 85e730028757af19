"""SLURM's notice in the first moments of a job: before anything was started, or while Python still starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.launch.arguments import parse
from nemo_fp8_recipes.launch.slurm.submit import dry_run
from tests.launch.conftest import clean_environment

BASE = ("launcher=slurm", "launcher.tasks=gpu", "device=emulated", "launcher.nproc_per_node=1", "run_dir=run")

JOB = """
import os, pathlib
with open("attempts", "a") as file:
    file.write(os.environ["SLURM_RESTART_COUNT"])
"""

# Stands in for srun: runs the task itself, as the only one. Before that it does what the test says.
SRUN = """#!/bin/bash
while [ "${{1#--}}" != "$1" ] || [ "$1" = srun ]; do shift; done
export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1
if [ -n "$NEMO_FP8_ONLY_CHECK" ]; then
  {check}
  exit 0
fi
{task}
exec "$@"
"""


def run(directory: Path, script: str, *, check: str = "", task: str = "", restarts: int = 0) -> int:
    """Run a batch script as SLURM would, with a stand-in for srun; the exit status."""
    tools = directory / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "srun").write_text(SRUN.format(check=check, task=task))
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tools}/requeued\n')
    for name in ("srun", "scontrol"):
        (tools / name).chmod(0o755)
    environment = {
        **clean_environment(),
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "42",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    done = subprocess.run(
        ["bash"], input=script, cwd=directory, env=environment, text=True, capture_output=True, timeout=120
    )
    print(done.stdout, done.stderr)
    return done.returncode


def requeued(directory: Path) -> list[str]:
    file = directory / "tools/requeued"
    return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def script(in_tmp: Path) -> str:
    (in_tmp / "job.py").write_text(JOB)
    return dry_run(parse([*BASE, "--", "job.py"]))


# What happens while a task's Python starts, which takes a while: SLURM tells the batch shell, and a signal of
# the user's, or of a cluster that signals every process of a job, may reach the task.
EARLY = {
    "batch shell": 'kill -USR1 "$PPID"; sleep 0.5',
    "batch shell and task": 'kill -USR1 "$PPID"; (sleep 0.02; kill -USR1 $$) & ',
    "batch shell, later": '(sleep 0.3; kill -USR1 "$PPID") & ',
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", EARLY.values(), ids=EARLY)
def test_a_notice_while_the_task_starts_sends_the_job_back_unharmed(
    in_tmp: Path, script: str, moment: str
) -> None:
    assert run(in_tmp, script, task=moment) == 143
    assert requeued(in_tmp) == ["requeue 42"]
    assert not (in_tmp / "attempts").exists()
    assert run(in_tmp, script, restarts=1) == 0
    assert (in_tmp / "attempts").read_text() == "1"
    assert len(requeued(in_tmp)) == 1
    assert not list((in_tmp / "run/.launch").glob("notice*"))


@pytest.mark.slow
def test_a_signal_to_the_task_alone_does_not_end_it_while_it_starts(in_tmp: Path, script: str) -> None:
    assert run(in_tmp, script, task="(sleep 0.02; kill -USR1 $$) &") == 0
    assert (in_tmp / "attempts").read_text() == "0"


def test_a_notice_before_the_job_starts_starts_nothing(in_tmp: Path, script: str) -> None:
    task = f"touch {in_tmp}/started"
    assert run(in_tmp, script, check='kill -USR1 "$PPID"; sleep 0.2', task=task) == 143
    assert requeued(in_tmp) == ["requeue 42"]
    assert not (in_tmp / "started").exists()
    assert not (in_tmp / "run").exists()


def test_a_check_that_fails_is_not_repeated_because_of_a_notice(in_tmp: Path, script: str) -> None:
    assert run(in_tmp, script, check='kill -USR1 "$PPID"; exit 2') == 2
    assert requeued(in_tmp) == []


def test_each_task_of_an_array_is_told_in_its_own_run_directory(in_tmp: Path) -> None:
    words = [word for word in BASE if not word.startswith("run_dir=")]
    (in_tmp / "job.py").write_text(JOB)
    written = dry_run(parse(["-m", *words, "fp8_recipe=delayed,tensorwise", "--", "job.py"]))
    told = 'echo "$NEMO_FP8_NOTICE" > notice; exit 1'
    for index, recipe in enumerate(("delayed", "tensorwise")):
        lines = f"export SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID={index}\n{written}"
        assert run(in_tmp, lines, check=told) == 1
        notice = Path((in_tmp / "notice").read_text().strip())
        assert notice.parent == in_tmp / f"runs/{recipe}-7_{index}/.launch"


def test_a_full_disk_does_not_keep_the_notice_from_the_job(in_tmp: Path, script: str) -> None:
    """Then the batch shell signals srun, which passes it on."""
    (in_tmp / "run").write_text("a file where the run directory would be, so that nothing can be written")
    task = f'trap "touch {in_tmp}/told; exit 143" USR1; kill -USR1 "$PPID"; sleep 5 & wait'
    assert run(in_tmp, script, task=task) == 143
    assert (in_tmp / "told").exists()


@pytest.mark.parametrize("time", ["5", "5:00", "0-0:05", "4:59"])
def test_a_time_limit_that_begins_with_the_notice_is_refused(in_tmp: Path, time: str) -> None:
    with pytest.raises(ConfigError, match=r"launcher\.time=.*launcher\.signal_seconds=300"):
        dry_run(parse([*BASE, f"launcher.time='{time}'"]))
    dry_run(parse([*BASE, f"launcher.time='{time}'", "launcher.signal_seconds=60"]))


def test_a_time_limit_in_words_is_left_to_sbatch(in_tmp: Path) -> None:
    assert "#SBATCH --time=UNLIMITED" in dry_run(parse([*BASE, "launcher.time=UNLIMITED"]))


FORKS = """
import multiprocessing, os, signal, sys, time
received = []
context = multiprocessing.get_context("fork")
workers = [context.Process(target=time.sleep, args=(600,), daemon=True) for _ in range(2)]
for worker in workers:
    worker.start()
for _ in range(20):  # ended at once, while they come into being
    short = context.Process(target=time.sleep, args=(600,), daemon=True)
    short.start()
    short.terminate()
    short.join(20)
    assert not short.is_alive()
signal.signal(signal.SIGTERM, lambda *_: received.append(1))
workers[0].terminate()
workers[0].join(20)
assert not workers[0].is_alive()
os.kill(workers[1].pid, signal.SIGUSR1)  # as a cluster does that signals every process of a job
time.sleep(0.5)
assert not received, "a child's signal is not its parent's"
assert workers[1].is_alive(), "the wish to stop ends the job, not what it started to save with"
workers[1].terminate()
workers[1].join(20)
open("ready", "w").close()
deadline = time.monotonic() + 20
while not received and time.monotonic() < deadline:
    time.sleep(0.05)
sys.exit(143 if received else 5)
"""


@pytest.mark.slow
def test_signals_of_a_jobs_own_children_are_not_the_jobs(in_tmp: Path) -> None:
    """Forked children, such as data loaders and writers of checkpoints, share what their parent set up."""
    (in_tmp / "job.py").write_text(FORKS)
    words = ("launch", "launcher=local", "device=emulated", "run_dir=run", "--", "job.py")
    process = subprocess.Popen([sys.executable, "-m", "nemo_fp8_recipes", *words], env=clean_environment())
    try:
        deadline = time.monotonic() + 60
        while not (in_tmp / "ready").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == 143
    finally:
        process.kill()
