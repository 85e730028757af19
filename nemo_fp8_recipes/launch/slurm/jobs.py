"""The jobs that a command line for SLURM means: one, or one for each combination of values."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.launch.arguments import Arguments
from nemo_fp8_recipes.launch.plan import Job, make_job

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

__all__ = ["combinations", "current_job_id", "parsed", "planned", "this_job"]

_TASK = "SLURM_ARRAY_TASK_ID"


def combinations(overrides: Sequence[str]) -> list[tuple[str, ...]]:
    """The overrides of each job: every combination of the values in `key=a,b,c`, the last key fastest.

    Raises:
        ConfigError: an override that cannot be read, or that sweeps over the launcher or the run directory.
    """
    choices: list[list[str]] = []
    for word in overrides:
        override = parsed(word)
        if not override.is_sweep_override():
            choices.append([word])
            continue
        key = override.get_key_element()
        if key == "run_dir" or key.split(".")[0] == "launcher":
            raise ConfigError(
                f"'{word}' gives several values, and the jobs of an array share {key}.", key=key, value=word
            )
        choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
    return list(itertools.product(*choices))


def parsed(word: str) -> Override:
    """Hydra's reading of one override, which may have several values. Raises `ConfigError`."""
    try:
        return OverridesParser.create().parse_overrides([word])[0]
    except HydraException as error:
        detail = str(error).splitlines()[0]
        raise ConfigError(f"'{word}' cannot be read: {detail}.", value=word) from error


def planned(arguments: Arguments) -> list[Job]:
    """The jobs before SLURM has numbered them: their ids are `%j`, or `%A_<index>` in an array.

    Raises:
        ConfigError: one of them does not compose, or an array shall share one `run_dir`.
    """
    each = combinations(arguments.overrides) if arguments.multirun else [arguments.overrides]
    jobs = [
        make_job(one, arguments.payload, job_id=f"%A_{index}" if arguments.multirun else "%j")
        for index, one in enumerate(each)
    ]
    if arguments.multirun and jobs[0].config.run_dir is not None:
        raise ConfigError(
            f"run_dir={jobs[0].config.run_dir} is one directory, and there are {len(jobs)} jobs.",
            key="run_dir",
            value=jobs[0].config.run_dir,
            hint="Leave it out: each job gets runs/<recipe>-<job id>.",
        )
    return jobs


def current_job_id(environ: Mapping[str, str] = os.environ) -> str:
    """The id of the SLURM job that this process belongs to: 42, or 42_1 in an array.

    Raises:
        ConfigError: this process belongs to none.
    """
    if "SLURM_ARRAY_JOB_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ[_TASK]}"
    if "SLURM_JOB_ID" not in environ:
        raise ConfigError(
            "nemo-fp8 launch --on-node is what the batch script starts; here is no SLURM job.",
            key="--on-node",
            hint="Leave --on-node out to submit a job.",
        )
    return environ["SLURM_JOB_ID"]


def this_job(arguments: Arguments, environ: Mapping[str, str] = os.environ) -> Job:
    """The job that this node is part of."""
    overrides = arguments.overrides
    if arguments.multirun:
        overrides = combinations(overrides)[int(environ[_TASK])]
    return make_job(overrides, arguments.payload, job_id=current_job_id(environ))
