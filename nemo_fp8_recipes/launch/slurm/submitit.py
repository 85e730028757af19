"""`hydra/launcher=submitit_slurm`, its settings composed from the keys of `launcher=slurm`.

What Hydra's plugin would leave to `hydra.launcher.*` is said once, in our own group: account, nodes, time,
environment and the rest mean the same as in `nemo-fp8 launch`. An override of `hydra.launcher.<key>` wins.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
from typing import Any

from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.launch.plan import Job
from nemo_fp8_recipes.launch.slurm.script import (
    config_of,
    gpus_per_node,
    meeting,
    surroundings,
    tasks_per_node,
)

__all__ = ["SIGNAL", "minutes", "register", "settings"]

SIGNAL = signal.SIGUSR1
"""What submitit's jobs are told with that their time is nearly up: what our processes save upon."""

_READABLE = re.compile(r"[^\\'\"]*")  # submitit quotes for a shell, and sbatch is none
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")


def register(job: Job, *, has_time: bool = False) -> None:
    """Make `hydra/launcher=submitit_slurm` of this process stand for the settings of `job`.

    Args:
        has_time: the time limit is given to Hydra's plugin itself.

    Raises:
        ConfigError: the plugin is not installed, or cannot do what the configuration asks for.
    """
    try:
        from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf
    except ImportError as error:
        raise ConfigError(
            "hydra/launcher=submitit_slurm needs Hydra's submitit launcher, which is not installed.",
            key="hydra/launcher",
            value="submitit_slurm",
            hint="pip install 'nemo-fp8-recipes[submitit]', or: nemo-fp8 launch -m launcher=slurm …",
        ) from error
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins
    from omegaconf import OmegaConf

    Plugins.instance()  # the plugin stores its own settings when it is found; ours come after
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = SIGNAL.name.removeprefix("SIG")  # read when submitit is imported
    node = OmegaConf.structured(SlurmQueueConf)
    for key, value in settings(job, has_time=has_time).items():
        node[key] = value
    ConfigStore.instance().store(group="hydra/launcher", name="submitit_slurm", node=node)


def settings(job: Job, *, has_time: bool = False) -> dict[str, Any]:
    """`hydra.launcher.*` for a job of `launcher=slurm`.

    Raises:
        ConfigError: a value that submitit has no place for.
    """
    launcher = config_of(job)
    for key in ("container_image", "container_mounts", "srun_arguments", "python"):
        if getattr(launcher, key):
            raise ConfigError(
                f"launcher.{key} has no counterpart in submitit.",
                key=f"launcher.{key}",
                value=getattr(launcher, key),
                hint="Submit an array of our own: nemo-fp8 launch -m launcher=slurm …",
            )
    more: dict[str, Any] = {"requeue" if launcher.requeue else "no-requeue": True}
    for option, key in (("reservation", "reservation"), ("mem", "memory")):
        if getattr(launcher, key) is not None:
            more[option] = _readable(key, getattr(launcher, key))
    if launcher.exclusive:
        more["exclusive"] = True
    for argument in launcher.sbatch_arguments:
        option, equals, value = argument.lstrip("-").partition("=")
        more[option] = _readable("sbatch_arguments", value) if equals else True
    named = {
        key: _readable(key, value)
        for key in ("account", "partition", "qos", "constraint", "comment")
        if (value := getattr(launcher, key)) is not None
    }
    return {
        **named,
        "submitit_folder": "${hydra.sweep.dir}/.submitit/%j",
        "name": _readable("job_name", launcher.job_name or "nemo-fp8"),
        "timeout_min": 60 if has_time else minutes(launcher.time),
        "nodes": launcher.nodes,
        "tasks_per_node": tasks_per_node(job),
        "gpus_per_node": gpus_per_node(job) or None,
        "cpus_per_task": launcher.cpus_per_task,
        "signal_delay_s": launcher.signal_seconds,
        "max_num_timeout": launcher.max_requeues if launcher.requeue and job.saves else 0,
        "array_parallelism": launcher.array_parallel or 256,
        "additional_parameters": more,
        "setup": [
            f"export SUBMITIT_PREEMPT_SIGNAL={SIGNAL.name.removeprefix('SIG')}",
            "export SLURM_KILL_BAD_EXIT=1",  # a rank that failed ends the others
            f"cd {shlex.quote(os.getcwd())}",
            *(line for line in surroundings(launcher) if line),
            *(line for line in meeting(launcher) if line),
        ],
    }


def _readable(key: str, value: object) -> str:
    """A value that arrives at sbatch as it is, quoted as submitit does it."""
    text = str(value)
    if not (text.isprintable() and _READABLE.fullmatch(text)):
        raise ConfigError(
            f"launcher.{key}={text[:80]!r} cannot be given to submitit.",
            key=f"launcher.{key}",
            value=text,
            allowed=["one line without quotes and backslashes"],
            hint="nemo-fp8 launch -m launcher=slurm … takes it.",
        )
    return text


def minutes(time: str | int | None) -> int:
    """A time limit as sbatch reads it, in minutes, rounded up.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    if time is None:
        raise ConfigError(
            "launcher.time needs a value: submitit gives every job a time limit.",
            key="launcher.time",
            allowed=["minutes, HH:MM:SS, D-HH or D-HH:MM:SS"],
        )
    match = _TIME.fullmatch(str(time))
    if match is None:
        raise ConfigError(
            f"launcher.time={time} cannot be read.",
            key="launcher.time",
            value=time,
            allowed=["minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS"],
        )
    parts = [int(part) for part in (match["first"], match["second"], match["third"]) if part is not None]
    if match["days"] is not None:  # days-hours[:minutes[:seconds]]
        hours, mins, seconds = (*parts, 0, 0)[:3]
        hours += 24 * int(match["days"])
    elif len(parts) == 3:
        hours, mins, seconds = parts
    else:  # minutes[:seconds]
        hours, (mins, seconds) = 0, (*parts, 0)[:2]
    return max(1, hours * 60 + mins + (seconds > 0))
