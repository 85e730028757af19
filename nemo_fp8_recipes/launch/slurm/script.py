"""The batch script. Written to be read: what SLURM is asked for, what surrounds the job, what starts it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import indent

from nemo_fp8_recipes import __version__
from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.launch.arguments import Arguments
from nemo_fp8_recipes.launch.notice import NOTICE
from nemo_fp8_recipes.launch.plan import Job
from nemo_fp8_recipes.launch.schema import SlurmConfig
from nemo_fp8_recipes.launch.slurm.quoting import directive
from nemo_fp8_recipes.launch.slurm.time_limit import refuse_early_notice
from nemo_fp8_recipes.training.run_directory import LAUNCH_DIRECTORY

__all__ = [
    "AWAIT",
    "TELL",
    "batch_script",
    "config_of",
    "gpus_per_node",
    "meeting",
    "surroundings",
    "tasks_per_node",
]

_FIRST_PORT, _PORTS = 20000, 20000

# Option of sbatch -> key of conf/launcher/slurm.yaml.
_OPTIONS = {
    "account": "account",
    "partition": "partition",
    "qos": "qos",
    "reservation": "reservation",
    "constraint": "constraint",
    "time": "time",
    "mem": "memory",
    "comment": "comment",
}


def config_of(job: Job) -> SlurmConfig:
    assert isinstance(job.launcher, SlurmConfig)
    return job.launcher


def batch_script(jobs: Sequence[Job], arguments: Arguments) -> str:
    """The script for one job, or for an array of several.

    Raises:
        ConfigError: a value that a batch script cannot hold.
    """
    job = jobs[0]
    parts = [
        "#!/bin/bash",
        *_directives(jobs, arguments),
        "",
        *_comments(jobs, arguments),
        "set -eo pipefail",
        *_notice(jobs),
        "",
        *surroundings(config_of(job)),
        *meeting(config_of(job)),
        *_commands(job, arguments),
        *_ending(job),
    ]
    return "\n".join(parts) + "\n"


# -- what SLURM is asked for -----------------------------------------------------------------------------


def _directives(jobs: Sequence[Job], arguments: Arguments) -> Iterator[str]:
    job, launcher = jobs[0], config_of(jobs[0])
    refuse_early_notice(launcher)
    name = launcher.job_name
    if name is None:
        name = "nemo-fp8" if arguments.multirun else f"nemo-fp8-{job.recipe.name}"
    yield directive("job-name", name, "job_name")
    for option, key in _OPTIONS.items():
        value = getattr(launcher, key)
        if value is not None:
            yield directive(option, value, key)
    yield directive("nodes", launcher.nodes, "nodes")
    yield directive("ntasks-per-node", tasks_per_node(job), "tasks")
    gpus = gpus_per_node(job)
    if gpus:
        yield directive("gpus-per-node", gpus, "gpus_per_node")
    if launcher.cpus_per_task is not None:
        yield directive("cpus-per-task", launcher.cpus_per_task, "cpus_per_task")
    if launcher.exclusive:
        yield "#SBATCH --exclusive"
    if arguments.multirun:
        limit = f"%{launcher.array_parallel}" if launcher.array_parallel is not None else ""
        yield directive("array", f"0-{len(jobs) - 1}{limit}", "array_parallel")
    yield directive("chdir", os.getcwd(), "chdir")
    yield "#SBATCH --requeue" if launcher.requeue else "#SBATCH --no-requeue"
    yield "#SBATCH --open-mode=append"
    yield directive("signal", f"B:USR1@{launcher.signal_seconds}", "signal_seconds")
    for argument in launcher.sbatch_arguments:
        option, _, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and option and "=" in argument:
            yield directive(option, value, "sbatch_arguments")
        elif argument.startswith("--") and option.replace("-", "").isalnum():
            yield f"#SBATCH --{option}"
        else:
            raise ConfigError(
                f"launcher.sbatch_arguments: {argument!r} is no option with two dashes.",
                key="launcher.sbatch_arguments",
                value=argument,
                allowed=["--option", "--option=value"],
            )


def tasks_per_node(job: Job) -> int:
    """Tasks that srun starts on each node."""
    return job.processes_per_node() if config_of(job).tasks == "gpu" else 1


def gpus_per_node(job: Job) -> int:
    """GPUs to ask for on each node; none when the device is emulated."""
    asked = config_of(job).gpus_per_node
    if asked is not None:
        return asked
    return 0 if job.emulated else int(job.config.hardware.gpus_per_node or job.processes_per_node())


def _comments(jobs: Sequence[Job], arguments: Arguments) -> Iterator[str]:
    yield f"# Written by nemo-fp8 launch {__version__}."
    if arguments.multirun:
        for index, job in enumerate(jobs):
            differing = [o for o in job.overrides if any(o not in other.overrides for other in jobs)]
            yield f"# task {index}: {' '.join(ascii(word)[1:-1] for word in differing)}"


# -- what surrounds the job ------------------------------------------------------------------------------


def surroundings(launcher: SlurmConfig) -> Iterator[str]:
    """Lines of bash: modules, environment, commands of the user's."""
    if launcher.modules:
        yield f"module load {shlex.join(launcher.modules)}"
        yield ""
    if launcher.environment:
        for name, value in launcher.environment.items():
            text = str(int(value)) if isinstance(value, bool) else str(value)
            yield f"export {name}={shlex.quote(text)}"
        yield ""
    if launcher.pre_commands:
        yield "# launcher.pre_commands, as they were written"
        yield from launcher.pre_commands
        yield ""


def meeting(launcher: SlurmConfig) -> Iterator[str]:
    """Lines of bash: where the processes of the nodes meet."""
    yield "# The batch script runs on the first node: there the processes meet."
    host = '"$(hostname)"' if launcher.rendezvous_host is None else shlex.quote(launcher.rendezvous_host)
    port: object = launcher.rendezvous_port
    if port is None:
        port = f"$(({_FIRST_PORT} + SLURM_JOB_ID % {_PORTS}))"
    yield f"export NEMO_FP8_RENDEZVOUS_HOST={host}"
    yield f"export NEMO_FP8_RENDEZVOUS_PORT={port}"
    yield ""


TELL = """
told=0
woken=0
job=
tell() {
  told=1
  woken=1
  [ -n "$job" ] || return 0
  { mkdir -p "$(dirname "$NEMO_FP8_NOTICE")" && : > "$NEMO_FP8_NOTICE"; } 2>/dev/null \\
    || kill -USR1 "$job" 2>/dev/null || true
}
trap tell USR1
"""
"""Lines of bash: SLURM's signal to this shell is said on to the job, whose process is `$job`, by a file."""


AWAIT = """
job=$!
[ "$told" = 0 ] || tell
# A signal interrupts `wait`; the job goes on until it has saved.
while true; do
  woken=0
  status=0
  wait "$job" || status=$?
  [ "$woken" = 1 ] || break
done
"""
"""Lines of bash: until the job, the last process that was started in the background, has ended."""


def _notice(jobs: Sequence[Job]) -> Iterator[str]:
    """Lines of bash: what becomes of SLURM's signal before the time limit."""
    yield ""
    yield "# SLURM signals this shell some time before the time limit; a file tells the job to save: a signal"
    yield "# could reach processes that do not listen yet."
    if not _is_of_array(jobs[0]):
        yield f"run_dir={_run_dir(jobs[0])}"
    else:
        yield "run_dirs=("
        for job in jobs:
            yield f"  {_run_dir(job)}"
        yield ")"
        yield "run_dir=${run_dirs[${SLURM_ARRAY_TASK_ID:-0}]}"
    yield f'export {NOTICE}="$run_dir/{LAUNCH_DIRECTORY}/notice-$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}"'
    yield from TELL.strip().splitlines()


def _is_of_array(job: Job) -> bool:
    return job.id.startswith("%A")


def _run_dir(job: Job) -> str:
    """The run directory as a word of bash, SLURM's number in it where the name is ours."""
    if job.config.run_dir is not None:
        return shlex.quote(str(job.run_dir))
    pattern, number = ("%A", "SLURM_ARRAY_JOB_ID") if _is_of_array(job) else ("%j", "SLURM_JOB_ID")
    before, _, after = str(job.run_dir).rpartition(pattern)
    return f'{shlex.quote(before)}"${number}"{after}'


# -- what starts it --------------------------------------------------------------------------------------


def _commands(job: Job, arguments: Arguments) -> Iterator[str]:
    launcher = config_of(job)
    python = launcher.python or ("python3" if launcher.container_image is not None else sys.executable)
    flags = [flag for flag, given in (("-m", arguments.multirun), ("--resume", arguments.resume)) if given]
    yield "launch=("
    yield '  sh -c \'trap "" USR1; exec "$@"\' sh  # Python has yet to start, and a signal would end it'
    yield f"  {shlex.quote(python)} -m nemo_fp8_recipes launch --on-node {' '.join(flags)}".rstrip()
    for word in arguments.overrides:
        yield f"  {shlex.quote(word)}"
    if arguments.payload.words:
        yield f"  -- {shlex.join(arguments.payload.words)}"
    yield ")"
    yield "srun=("
    yield f"  srun --nodes={launcher.nodes}"
    for option in (*_srun_options(job), *launcher.srun_arguments):
        yield f"  {shlex.quote(option)}"
    yield ")"
    yield ""
    yield "# Will it run? Every node answers, before torch is imported on any."
    yield (
        f'NEMO_FP8_ONLY_CHECK=1 "${{srun[@]}}" --ntasks={launcher.nodes} --ntasks-per-node=1 '
        '--kill-on-bad-exit=0 "${launch[@]}"'
    )
    yield ""
    tasks = tasks_per_node(job)
    start = f"--ntasks={launcher.nodes * tasks} --ntasks-per-node={tasks} --kill-on-bad-exit=1"
    yield _RUN.format(start=start, wait=indent(AWAIT.strip(), "  ")).strip()


def _srun_options(job: Job) -> Iterator[str]:
    launcher = config_of(job)
    if launcher.cpus_per_task is not None:  # since SLURM 22.05 srun does not take it over from sbatch
        yield f"--cpus-per-task={launcher.cpus_per_task}"
    if launcher.container_image is None:
        if launcher.container_mounts:
            raise ConfigError(
                "launcher.container_mounts needs launcher.container_image.", key="launcher.container_mounts"
            )
        return
    here = os.getcwd()
    mounts = [f"{here}:{here}"]
    if job.config.run_dir is not None and not job.run_dir.is_relative_to(Path(here)):
        mounts.append(f"{job.run_dir}:{job.run_dir}")
    mounts += launcher.container_mounts
    for mount in mounts:
        if "," in mount:
            raise ConfigError(
                f"{mount!r} cannot be mounted: pyxis separates mounts by commas.",
                key="launcher.container_mounts",
                value=mount,
                allowed=["SRC:DST[:FLAGS] without commas"],
            )
    yield f"--container-image={launcher.container_image}"
    yield f"--container-mounts={','.join(mounts)}"
    yield f"--container-workdir={here}"


_REQUEUE = """
# It stopped because its time was up, and saved: it goes on in the next slot.
if [ "$told" = 1 ] && [ "$status" = 143 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {limit} ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
"""


_RUN = """
status=143  # told before it began
if [ "$told" = 0 ]; then
  "${{srun[@]}}" {start} "${{launch[@]}}" &
{wait}
fi
rm -f "$NEMO_FP8_NOTICE" || true
"""


def _ending(job: Job) -> Iterator[str]:
    launcher = config_of(job)
    if launcher.requeue and job.saves:
        yield _REQUEUE.format(limit=launcher.max_requeues).rstrip()
    yield 'exit "$status"'
