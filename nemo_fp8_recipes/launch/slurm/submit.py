"""Submitting: sbatch numbers the job while it is held, then its run directory is made, then it may start."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from nemo_fp8_recipes.errors import Fp8Error
from nemo_fp8_recipes.launch.arguments import Arguments
from nemo_fp8_recipes.launch.check import check_plan
from nemo_fp8_recipes.launch.claim import refuse_existing, reserve
from nemo_fp8_recipes.launch.directory import LaunchDirectory
from nemo_fp8_recipes.launch.plan import Job, default_run_dir
from nemo_fp8_recipes.launch.schema import SlurmConfig
from nemo_fp8_recipes.launch.slurm.jobs import planned
from nemo_fp8_recipes.launch.slurm.query import job_state
from nemo_fp8_recipes.launch.slurm.quoting import output_pattern
from nemo_fp8_recipes.launch.slurm.script import batch_script, config_of
from nemo_fp8_recipes.training.files import atomic_write_text

__all__ = ["SlurmError", "dry_run", "submit"]

_FIRST_POLL_SECONDS, _POLL_SECONDS = 0.5, 10.0
_SECONDS = 120  # a SLURM controller under load takes its time


class SlurmError(Fp8Error):
    """SLURM refused what it was asked, or is not there."""


def dry_run(arguments: Arguments) -> str:
    """The batch script that would be submitted."""
    return batch_script(planned(arguments), arguments)


def submit(arguments: Arguments, typed: Sequence[str]) -> int:
    """Submit the job or the array; the exit status is 0, or the job's with `launcher.wait`.

    Raises:
        SlurmError: sbatch is not there or refuses the job.
        PreflightError: a job would fail; nothing is submitted.
        RunDirectoryError: a run directory cannot be used; nothing stays in the queue.
    """
    jobs = planned(arguments)
    script = batch_script(jobs, arguments)
    for job in jobs:
        check_plan(job)
        if job.config.run_dir is not None:
            refuse_existing(job, resume=arguments.resume, overwrite=arguments.overwrite)
    number = _sbatch(jobs[0], script)
    try:
        numbered = [_numbered(job, number) for job in jobs]
        for job in numbered:
            _reserve(job, script, arguments, typed, number)
        if arguments.multirun:
            for job in numbered:
                output = output_pattern(str(LaunchDirectory(job.run_dir).batch_output))
                _slurm("scontrol", "update", f"JobId={job.id}", f"StdOut={output}")
        _slurm("scontrol", "release", number)
    except BaseException:
        subprocess.run(["scancel", number], check=False, timeout=_SECONDS)
        raise
    for job in numbered:
        print(f"Submitted job {job.id}: {_shortest(job.run_dir)}", flush=True)
        if config_of(job).requeue and not job.saves:
            print("It is not requeued at its time limit: training.save_every=0 saves nothing to go on from.")
    if not config_of(jobs[0]).wait:
        return 0
    return max(_wait(job) for job in numbered)


def _shortest(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _numbered(job: Job, number: str) -> Job:
    """The job with SLURM's number in its id and its run directory."""
    identity = job.id.replace("%j", number).replace("%A", number)
    if job.config.run_dir is not None:
        return dataclasses.replace(job, id=identity)
    run_dir = default_run_dir(job.recipe.name, identity).absolute()
    return dataclasses.replace(job, id=identity, run_dir=run_dir)


def _reserve(job: Job, script: str, arguments: Arguments, typed: Sequence[str], number: str) -> None:
    claimed = reserve(
        job,
        typed,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        extra={"slurm": {"job_id": job.id, "submitted_as": number}},
    )
    for note in claimed.notes:
        print(note)
    atomic_write_text(claimed.directory.batch_script, script)


def _sbatch(job: Job, script: str) -> str:
    """Submit, held; the number of the job or of the array."""
    if job.id == "%j":
        directory = LaunchDirectory(job.run_dir)
        # The job's number is part of the directory's name only where the name is ours.
        given = job.config.run_dir is not None
        path = str(directory.batch_output)
        prefix, _, rest = path.rpartition("%j") if not given else (path, "", "")
        output = output_pattern(prefix) + ("" if given else "%j" + output_pattern(rest))
    else:
        output = "/dev/null"  # until each task of the array is given its own
    answer = _slurm("sbatch", "--parsable", "--hold", f"--output={output}", stdin=script, job=job)
    return answer.strip().split(";")[0]


def _environment(launcher: SlurmConfig) -> dict[str, str]:
    """The environment without SBATCH_ variables, which would win over what the script asks for."""
    del launcher
    return {name: value for name, value in os.environ.items() if not name.startswith("SBATCH_")}


def _slurm(*command: str, stdin: str | None = None, job: Job | None = None) -> str:
    if shutil.which(command[0]) is None:
        raise SlurmError(
            f"There is no {command[0]} on this machine: launcher=slurm submits from a SLURM login node.",
            key="launcher",
            value="slurm",
            hint="--dry-run prints the script; launcher=torchrun starts the job here.",
        )
    environment = _environment(config_of(job)) if job is not None else None
    try:
        done = subprocess.run(
            command,
            input=stdin,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} gave no answer in {_SECONDS} s.") from None
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip() or f"exit status {done.returncode}"
        raise SlurmError(f"{command[0]} refuses the job: {said}.", hint="--dry-run prints the script.")
    return done.stdout


def _wait(job: Job) -> int:
    """Wait until SLURM says that the job has ended; its exit status. It is asked ever less often."""
    pause = _FIRST_POLL_SECONDS
    while True:
        state = job_state(job.id)
        if state is None:
            raise SlurmError(
                f"SLURM no longer knows job {job.id}.", hint="nemo-fp8 runs says how the run ended."
            )
        if state.ended:
            print(f"Job {job.id}: {state.name.lower()}, exit status {state.exit_status}", flush=True)
            return state.exit_status if state.exit_status or state.name == "COMPLETED" else 1
        time.sleep(pause)
        pause = min(_POLL_SECONDS, pause * 1.25)
