"""`-m`: one job for each combination of values, by Hydra's own multirun.

    nemo-fp8 train -m fp8_recipe=delayed,tensorwise                                   one after the other
    nemo-fp8 train -m fp8_recipe=delayed,tensorwise hydra/launcher=submitit_slurm     an array of SLURM jobs

It is a Hydra application like any other: sweepers, launchers, `hydra.*` overrides and `--cfg` work as Hydra
documents them. Each job is started as `nemo-fp8 launch` starts it, in processes of its own, since a process
that trains becomes one GPU, and its run directory is Hydra's output directory for the job.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from nemo_fp8_recipes.config.overrides import RECIPE_GROUP
from nemo_fp8_recipes.config.paths import ROOT_CONFIG, conf_dir
from nemo_fp8_recipes.errors import ConfigError, Fp8Error
from nemo_fp8_recipes.launch import local, torchrun
from nemo_fp8_recipes.launch.arguments import Payload
from nemo_fp8_recipes.launch.check import check_plan
from nemo_fp8_recipes.launch.hydra_text import override
from nemo_fp8_recipes.launch.plan import RUNS, Job, make_job
from nemo_fp8_recipes.launch.slurm import on_node, submitit
from nemo_fp8_recipes.launch.slurm.jobs import combinations, current_job_id, parsed
from nemo_fp8_recipes.recipes import resolve

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["SweptJobError", "asked", "names_hydra_launcher", "run"]

_FLAGS = ("-m", "--multirun")
_DRY_RUN = "--dry-run"
_LAUNCHER = "hydra/launcher="
_SWEEPER = "hydra/sweeper="
_REQUEUE_SECONDS = 120.0


class SweptJobError(Fp8Error):
    """A job of a sweep ended with another exit status than 0."""


def asked(words: Sequence[str]) -> bool:
    """Whether the command line asks for several jobs."""
    return any(word in _FLAGS for word in words)


def names_hydra_launcher(words: Sequence[str]) -> bool:
    return any(word.startswith(_LAUNCHER) for word in words)


def run(words: Sequence[str]) -> int:
    """Run the jobs that `words` mean, as Hydra's launcher does; returns when they have ended.

    Raises:
        ConfigError, RecipeError, PreflightError: one of them would fail; nothing was started.
    """
    for word in ("--", "--resume", "--overwrite"):
        if word in words:
            raise ConfigError(
                f"-m runs new jobs of nemo-fp8 train: it takes no {word}.",
                key=word,
                hint="An array of SLURM jobs takes it: nemo-fp8 launch -m launcher=slurm …",
            )
    kept = [word for word in words if word not in (*_FLAGS, _DRY_RUN)]
    options, words_of_jobs = _hydra_options(kept)
    overrides = [_canonical(word) for word in words_of_jobs]
    of_hydra = [word for word in overrides if word.lstrip("+~").startswith(("hydra.", "hydra/"))]
    of_jobs = [word for word in overrides if word not in of_hydra]
    by_slurm = f"{_LAUNCHER}submitit_slurm" in of_hydra
    of_jobs = _with_launcher(of_jobs, by_slurm=by_slurm)
    jobs = _planned(of_jobs) if not any(word.startswith(_SWEEPER) for word in of_hydra) else []
    for job in jobs:
        check_plan(job)
    first = jobs[0] if jobs else make_job([word for word in of_jobs if not _sweeps(word)], Payload("train"))
    if _DRY_RUN in words:
        print(_description(jobs, by_slurm=by_slurm), end="")
        return 0
    if by_slurm:
        submitit.register(first, has_time="hydra.launcher.timeout_min" in "".join(of_hydra))
    name = "${hydra.job.id}" if by_slurm else f"{secrets.token_hex(4)}_${{hydra.job.num}}"
    ours = [
        "hydra.mode=MULTIRUN",
        "hydra.job.name=nemo-fp8",
        "hydra/job_logging=stdout",  # a log file in the run directory would be another run's file
        f"hydra.sweep.dir={RUNS}",
        f"hydra.sweep.subdir='${{{RECIPE_GROUP}.name}}-{name}'",
    ]
    application = hydra.main(config_path=str(conf_dir()), config_name=ROOT_CONFIG, version_base="1.3")(
        swept_job
    )
    before = sys.argv
    sys.argv = ["nemo-fp8 train", *options, *ours, *of_hydra, *of_jobs]
    try:
        application()
    except SystemExit as exit:
        return int(exit.code or 0) if not isinstance(exit.code, str) else 1
    finally:
        sys.argv = before
    return 0


def _hydra_options(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Hydra's own options with their values (`--cfg job`, `--package=model`), and the overrides."""
    options: list[str] = []
    overrides: list[str] = []
    for before, word in zip(("", *words), words, strict=False):
        is_value = before.startswith("-") and "=" not in word and not word.startswith("~")
        (options if word.startswith("-") or is_value else overrides).append(word)
    return options, overrides


def _canonical(word: str) -> str:
    """Other tools' recipe names replaced by ours: Hydra knows the files in conf/ only."""
    key, equals, values = word.partition("=")
    if key != RECIPE_GROUP or not equals or "(" in values:
        return word
    return f"{key}=" + ",".join(resolve(value.strip()).choice for value in values.split(","))


def _with_launcher(words: list[str], *, by_slurm: bool) -> list[str]:
    """The overrides with `launcher=slurm` where Hydra's launcher is SLURM's; refused where the two differ."""
    chosen = next((word.partition("=")[2] for word in reversed(words) if word.startswith("launcher=")), None)
    if by_slurm and chosen is None:
        return ["launcher=slurm", *words]
    if by_slurm and chosen != "slurm":
        raise ConfigError(
            f"hydra/launcher=submitit_slurm takes its settings from launcher=slurm, not launcher={chosen}.",
            key="launcher",
            value=chosen,
            allowed=["slurm"],
        )
    if chosen == "slurm" and not by_slurm:
        raise ConfigError(
            "launcher=slurm cannot run jobs one after the other here.",
            key="launcher",
            value=chosen,
            hint="Add hydra/launcher=submitit_slurm, or submit an array: nemo-fp8 launch -m launcher=slurm …",
        )
    return words


def _sweeps(word: str) -> bool:
    return parsed(word).is_sweep_override()


def _planned(words: Sequence[str]) -> list[Job]:
    """The jobs as far as they are known beforehand: none when a sweeper chooses values as it goes."""
    if any(override.is_interval_sweep() for override in map(parsed, words)):
        return []
    jobs = [
        make_job(one, Payload("train"), job_id=str(index)) for index, one in enumerate(combinations(words))
    ]
    if jobs[0].config.run_dir is not None:
        raise ConfigError(
            f"run_dir={jobs[0].config.run_dir} is one directory, and there are {len(jobs)} jobs.",
            key="run_dir",
            value=jobs[0].config.run_dir,
            hint="Leave it out, or choose where they lie: hydra.sweep.dir=PATH.",
        )
    return jobs


def _description(jobs: Sequence[Job], *, by_slurm: bool) -> str:
    """What would be started: the overrides of each job, and what submitit is told."""
    lines = ["# the overrides of each job"]
    lines += [
        " ".join(o for o in job.overrides if any(o not in other.overrides for other in jobs)) for job in jobs
    ]
    if by_slurm and jobs:
        lines += ["", "# hydra.launcher, from the keys of launcher=slurm"]
        lines.append(OmegaConf.to_yaml(OmegaConf.create(submitit.settings(jobs[0]))).rstrip())
    return "\n".join(lines) + "\n"


# -- one of the jobs ---------------------------------------------------------------------------------------


def swept_job(config: DictConfig) -> float | None:
    """Run one job to its end, here or in a task of a SLURM job; its held-out or last loss, for sweepers.

    Raises:
        SweptJobError: it ended with another exit status than 0.
    """
    of_hydra = HydraConfig.get()
    run_dir = Path(of_hydra.runtime.output_dir)
    overrides = [*of_hydra.overrides.task, override("run_dir", str(run_dir))]
    name = run_dir.name.removeprefix(f"{config[RECIPE_GROUP].name}-")
    typed = ["nemo-fp8", "train", *of_hydra.overrides.task]
    if os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
        job = make_job(overrides, Payload("train"), job_id=current_job_id())
        extra: dict[str, Any] = {"slurm": {"job_id": job.id, "submitted_as": job.id.partition("_")[0]}}
        ended = on_node.run_task(job, typed, extra=extra)
        if ended.asked == submitit.SIGNAL and job.saves:
            # Its time is nearly up and it has saved: submitit's handler, ours until now, requeues it.
            signal.raise_signal(submitit.SIGNAL)
            time.sleep(_REQUEUE_SECONDS)  # not the first task: SLURM ends it with the requeued job
        status = ended.status
    else:
        job = make_job(overrides, Payload("train"), job_id=name)
        start = local.run if job.launcher.name == "local" else torchrun.run
        status = start(job, typed, resume=False, overwrite=False)
    if status:
        raise SweptJobError(f"{run_dir} ended with exit status {status}; nemo-fp8 runs says why.")
    return _loss(run_dir)


def _loss(run_dir: Path) -> float | None:
    from nemo_fp8_recipes.training.run_directory import read_run

    result = read_run(run_dir).get("result") or {}
    found = result.get("held_out_loss")
    return found if found is not None else result.get("last_loss")
