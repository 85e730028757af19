"""`nemo-fp8 launch`: start a job with torchrun or SLURM."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from nemo_fp8_recipes.config.overrides import parse as parse_overrides
from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.launch import local, sweep, torchrun
from nemo_fp8_recipes.launch.arguments import Arguments, parse
from nemo_fp8_recipes.launch.node import Processes, settings_for, worker_command
from nemo_fp8_recipes.launch.plan import Job, make_job
from nemo_fp8_recipes.launch.slurm import on_node, submit

__all__ = ["HELP", "run"]

HELP = """
usage: nemo-fp8 launch [launcher=local|torchrun|slurm] [group=choice] [group.key=value] ... [options]
                       [-- SCRIPT [ARGUMENT ...] | -- -m MODULE [ARGUMENT ...]]

Start `nemo-fp8 train` with these overrides, or your own script, where launcher= says. Every process gets the
same configuration, and a job has one run directory, runs/<recipe>-<job id>, whatever its number of nodes.

launcher:
  local      one process here
  torchrun   one process a GPU here, or on several nodes: type the same command on each of them
  slurm      submit a batch job; -m submits an array of one job for each combination of values
  launcher.<key>=… sets what it takes; see conf/launcher/

options:
  --dry-run     print what would be started, and start nothing
  --resume      go on with the run in run_dir from its newest complete checkpoint
  --overwrite   put the run in run_dir aside (run_dir/.launch/replaced) and start a new one
  -m            a job for each combination of values in key=a,b,c: an array with launcher=slurm, else one
                after the other

examples:
  nemo-fp8 launch launcher=torchrun hardware=h100 fp8_recipe=blockwise model=nemotron3_8b parallel.tp=2
  nemo-fp8 launch launcher=torchrun launcher.nodes=2 launcher.rendezvous=node-1:29500 launcher.job_id=42 \\
      hardware=h100 fp8_recipe=tensorwise
  nemo-fp8 launch launcher=slurm launcher.account=research launcher.nodes=4 hardware=b200 fp8_recipe=mxfp8 \\
      training.save_every=500 --dry-run
  nemo-fp8 launch launcher=torchrun launcher.nproc_per_node=8 fp8_recipe=mxfp8 -- pretrain.py --layers 32

Ctrl-C or SIGTERM ends the step and saves; a second Ctrl-C ends at once. The exit status is the job's.
"""


def run(words: list[str]) -> int:
    """Compose the configuration, once, and start the job where `launcher=` says."""
    arguments = parse(words)
    typed = ["nemo-fp8", "launch", *words]
    if arguments.on_node:
        return on_node.run(arguments, typed)
    if arguments.multirun and (_launcher(arguments) != "slurm" or sweep.names_hydra_launcher(words)):
        return sweep.run(words)
    _require_something_to_resume(arguments)
    if _launcher(arguments) == "slurm":
        if arguments.dry_run:
            print(submit.dry_run(arguments), end="")
            return 0
        return submit.submit(arguments, typed)
    job = make_job(arguments.overrides, arguments.payload)
    if arguments.dry_run:
        print(describe(job, arguments), end="")
        return 0
    launch = local.run if job.launcher.name == "local" else torchrun.run
    return launch(job, typed, resume=arguments.resume, overwrite=arguments.overwrite)


def _require_something_to_resume(arguments: Arguments) -> None:
    """Refuse `--resume` where the run directory would be a new one."""
    if not arguments.resume or arguments.multirun:
        return
    named = {override.get_key_element() for override in parse_overrides(arguments.overrides)}
    if not named & {"run_dir", "launcher.job_id"}:
        raise ConfigError(
            "--resume goes on with the run in run_dir, and none is named.",
            key="run_dir",
            hint="Add run_dir=PATH; nemo-fp8 runs lists the runs that are here.",
        )


def _launcher(arguments: Arguments) -> str:
    """The choice of `launcher=`, known before the values of a sweep are taken apart."""
    chosen = [
        override.value()
        for override in parse_overrides(
            [word for word in arguments.overrides if word.startswith("launcher=")]
        )
    ]
    return str(chosen[-1]) if chosen else "local"


def describe(job: Job, arguments: Arguments) -> str:
    """The commands that `local` and `torchrun` would run, as a shell would read them."""
    started: Processes = local.PROCESSES if job.launcher.name == "local" else torchrun.processes(job)
    variables = settings_for(job, None, started.count, {})
    lines = [f"# run directory: {shlex.quote(str(job.run_dir))}"]
    lines += [f"export {v.name}={shlex.quote(v.value)}" for v in variables]
    lines.append(_broken(worker_command(job, started.prefix, resume=arguments.resume)))
    return "\n".join(lines) + "\n"


def _broken(command: Sequence[str]) -> str:
    """A command over several lines: a new one for each option or override with a value."""
    lines: list[list[str]] = [[]]
    for word in command:
        if "=" in word:
            lines.append([])
        lines[-1].append(shlex.quote(word))
    return " \\\n    ".join(" ".join(line) for line in lines)
