"""The job that a command line means: configuration, id, run directory, processes on a node."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_fp8_recipes import config, recipes
from nemo_fp8_recipes.config.schema import read
from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.launch.arguments import Payload
from nemo_fp8_recipes.launch.hydra_text import override
from nemo_fp8_recipes.launch.schema import LauncherConfig, LocalConfig, SlurmConfig, TorchrunConfig
from nemo_fp8_recipes.preflight import driver

__all__ = ["RUNS", "Job", "default_run_dir", "make_job", "new_job_id"]

RUNS = Path("runs")


@dataclass(frozen=True)
class Job:
    """One job: what runs, under which id, in which run directory."""

    id: str
    run_dir: Path
    """Absolute."""
    overrides: tuple[str, ...]
    """As typed."""
    payload: Payload
    config: DictConfig
    launcher: LauncherConfig
    recipe: recipes.Recipe

    @property
    def values(self) -> dict[str, Any]:
        """The composed configuration as plain data."""
        container = OmegaConf.to_container(self.config, resolve=True)
        assert isinstance(container, dict)
        return {str(key): value for key, value in container.items()}

    @property
    def emulated(self) -> bool:
        """Whether the device is emulated by request. What `auto` means is decided by the job itself."""
        return str(self.config.device) == "emulated"

    @property
    def saves(self) -> bool:
        """Whether there will be checkpoints to go on from, as far as the launcher can know."""
        return self.payload.kind != "train" or self.config.training.save_every > 0

    def processes_per_node(self) -> int:
        """Processes on each node: as asked, or one for each GPU.

        Raises:
            ConfigError: neither the configuration nor this machine says how many.
        """
        if isinstance(self.launcher, LocalConfig):
            return 1
        assert isinstance(self.launcher, TorchrunConfig | SlurmConfig)
        if self.launcher.nproc_per_node is not None:
            return self.launcher.nproc_per_node
        if isinstance(self.launcher, SlurmConfig) and self.launcher.gpus_per_node:
            return self.launcher.gpus_per_node
        known = self.config.hardware.gpus_per_node
        if known is not None:
            return int(known)
        if isinstance(self.launcher, TorchrunConfig) and not self.emulated:
            count = len(driver.found())
            if count:
                return count
        raise ConfigError(
            f"launcher.nproc_per_node needs a value: hardware={self.config.hardware.name} does not say how "
            "many GPUs a node has.",
            key="launcher.nproc_per_node",
            hint="Set it, or choose the hardware: hardware=h100.",
        )

    def train_arguments(self, *, resume: bool) -> list[str]:
        """The arguments of `nemo-fp8 train`, the same on every rank: the overrides, this run directory."""
        arguments = [word for word in self.overrides if not word.startswith("run_dir=")]
        arguments.append(override("run_dir", str(self.run_dir)))
        if resume and not any(word.startswith("training.resume=") for word in self.overrides):
            arguments.append("training.resume=auto")
        return arguments


def new_job_id() -> str:
    """An id for a job that no batch system numbers: random, so that two of the same second differ."""
    return secrets.token_hex(4)


def default_run_dir(recipe: str, job_id: str) -> Path:
    """`runs/<recipe>-<job id>` below the working directory."""
    return RUNS / f"{recipe}-{job_id}"


def make_job(
    overrides: Sequence[str],
    payload: Payload,
    *,
    job_id: str | None = None,
    composed: DictConfig | None = None,
) -> Job:
    """The job that `overrides` mean.

    Args:
        overrides: Hydra overrides, one value each.
        payload: what its processes run.
        job_id: the batch system's; None: `launcher.job_id`, or a random one.
        composed: the configuration, where the caller has it already.

    Raises:
        ConfigError, RecipeError: the configuration does not compose.
    """
    composed = config.compose(overrides) if composed is None else composed
    values: Mapping[str, Any] = OmegaConf.to_container(composed.launcher, resolve=True)  # type: ignore[assignment]  # a mapping by its schema
    launcher: LauncherConfig = read("launcher", values)
    recipe = recipes.load(composed.fp8_recipe)
    identity = job_id
    if identity is None:
        given = getattr(launcher, "job_id", None)
        identity = str(given) if given is not None else new_job_id()
    directory = (
        Path(composed.run_dir) if composed.run_dir is not None else default_run_dir(recipe.name, identity)
    )
    return Job(
        id=identity,
        run_dir=directory.absolute(),
        overrides=tuple(overrides),
        payload=payload,
        config=composed,
        launcher=launcher,
        recipe=recipe,
    )
