"""`hydra/launcher=submitit_slurm`, its settings composed from the keys of `launcher=slurm`.

What Hydra's plugin would leave to `hydra.launcher.*` is said once, in our own group: account, nodes, time,
environment and the rest mean the same as in `nemo-fp8 launch`. An override of `hydra.launcher.<key>` wins.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
from textwrap import indent
from typing import Any

from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.launch.notice import NOTICE
from nemo_fp8_recipes.launch.plan import Job
from nemo_fp8_recipes.launch.slurm.script import (
    AWAIT,
    TELL,
    config_of,
    gpus_per_node,
    meeting,
    surroundings,
    tasks_per_node,
)
from nemo_fp8_recipes.launch.slurm.time_limit import minutes, refuse_early_notice

__all__ = ["SIGNAL", "register", "settings"]

SIGNAL = signal.SIGUSR1
"""What submitit's jobs are told with that their time is nearly up: what our processes save upon."""

_READABLE = re.compile(r"[^\\'\"]*")  # submitit quotes for a shell, and sbatch is none


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
    if not has_time:
        refuse_early_notice(launcher)
    for key in ("container_image", "container_mounts", "srun_arguments", "python"):
        if getattr(launcher, key):
            raise ConfigError(
                f"launcher.{key} has no counterpart in submitit.",
                key=f"launcher.{key}",
                value=getattr(launcher, key),
                hint="Submit an array of our own: nemo-fp8 launch -m launcher=slurm …",
            )
    more: dict[str, Any] = {
        "requeue" if launcher.requeue else "no-requeue": True,
        # To the batch shell, where submitit would have every process signalled, also those that do not listen
        # yet.
        "signal": f"B:{SIGNAL.name.removeprefix('SIG')}@${{hydra.launcher.signal_delay_s}}",
    }
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
            *_noticed(launcher.max_requeues if launcher.requeue and job.saves else 0),
            *(line for line in surroundings(launcher) if line),
            *(line for line in meeting(launcher) if line),
        ],
    }


_SRUN = """
srun() {{
  status=143  # told before it began
  if [ "$told" = 0 ]; then
    env srun "$@" &
{wait}
  elif [ "$restarts" -lt {requeues} ]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
  rm -f "$NEMO_FP8_NOTICE"
  return "$status"
}}
"""


def _noticed(requeues: int) -> list[str]:
    """Lines of bash: what becomes of SLURM's signal before the time limit. It becomes a file, as in our own
    batch script; for that a function stands in for `srun`, with which submitit's script starts the job.
    """
    wait = indent(AWAIT.strip(), "    ")
    place = "$(realpath -m '${hydra.sweep.dir}')/.submitit/notice-$SLURM_JOB_ID-$restarts"
    return [
        "restarts=$((SLURM_RESTART_COUNT + 0))",  # which SLURM sets from the first one on
        f'export {NOTICE}="{place}"',
        *TELL.strip().splitlines(),
        *_SRUN.format(wait=wait, requeues=requeues).strip().splitlines(),
    ]


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
