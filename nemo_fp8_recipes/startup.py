"""What a training program does first: recipe, preflight, device, in that order and before torch is imported.

The reference job starts this way, and so does a script of your own:

    config = compose(sys.argv[1:])
    job = fp8.start(config)
    print(job.recipe.name, "on", job.device.label)
    import torch, megatron.core          # from here on the device is in place, emulated or not

A script with a configuration of its own starts from the recipe alone:

    job = fp8.start(fp8.load("mxfp8"))
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from nemo_fp8_recipes import config as configuration
from nemo_fp8_recipes import dependencies, emulation, preflight, recipes
from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.recipes.modules import ModuleRecipe, module_recipes_of, recipes_of
from nemo_fp8_recipes.recipes.schedule import Schedule, schedule_of

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from nemo_fp8_recipes.emulation import EmulatedDevice, NativeDevice
    from nemo_fp8_recipes.preflight import Finding
    from nemo_fp8_recipes.recipes import Recipe

__all__ = ["Start", "start"]


@dataclass(frozen=True)
class Start:
    """A job that may go on.

    Attributes:
        recipe: the recipe of `config.fp8_recipe`.
        device: what it runs on; `device.label` belongs into every record.
        findings: what preflight found that does not stop the job.
        schedule: which recipe each optimizer step trains with.
        modules: single modules with a recipe of their own.
    """

    recipe: Recipe
    device: EmulatedDevice | NativeDevice
    findings: tuple[Finding, ...]
    schedule: Schedule
    modules: tuple[ModuleRecipe, ...]


def start(
    job: DictConfig | Recipe,
    environ: Mapping[str, str] = os.environ,
    *,
    device: str | None = None,
    hardware: str | None = None,
) -> Start:
    """Check the job and put its device in place. Call it before Transformer Engine or Megatron is imported.

    Args:
        job: what `config.compose` returned; or the recipe alone, and then the shapes of the model, which
            nobody knows here, are not checked.
        environ: the process environment, which says whether torchrun or SLURM started this process.
        device: with a recipe, "auto", "native" or "emulated"; None is "auto". A configuration has its own.
        hardware: with a recipe, the GPU it is for; None is "auto". A configuration has its own.

    Raises:
        PreflightError: the job would fail; nothing has been built.
        EmulationError: the device asked for cannot be had here.
        RecipeError: the recipe cannot take its options.
        ConfigError: a device is given beside a configuration that names one.
        DependencyError: a package that this one depends on is not installed.
    """
    dependencies.require()
    config, knows_model = _configuration(job, device, hardware)
    schedule = schedule_of(config)
    modules = module_recipes_of(config, schedule)
    recipe = schedule.main
    emulated = emulation.should_start(str(config.device), environ)
    findings = preflight.check_job(config, environ, emulated=emulated, knows_model=knows_model)
    preflight.require(findings)
    node: dict[str, Any] = OmegaConf.to_container(config.hardware, resolve=True)  # type: ignore[assignment]  # a group is a mapping
    if emulated:
        node["name"] = preflight.posing_device(
            recipe, node["name"], *schedule.recipes()[1:], *recipes_of(modules)
        )
    in_place = emulation.switch(str(config.device), node, environ)
    if not emulated:
        # Only now is it known which GPU `hardware=auto` is.
        found = preflight.Hardware(
            name="auto", display_name=in_place.label, capability=in_place.compute_capability
        )
        findings = preflight.check_job(config, environ, emulated=False, found=found, knows_model=knows_model)
        preflight.require(findings)
    return Start(recipe, in_place, tuple(findings), schedule, modules)


def _configuration(
    job: DictConfig | Recipe, device: str | None, hardware: str | None
) -> tuple[DictConfig, bool]:
    """The configuration to check, and whether its model is the one that will run."""
    if isinstance(job, recipes.Recipe):
        config = configuration.compose([f"device={device or 'auto'}", f"hardware={hardware or 'auto'}"])
        OmegaConf.update(config, "fp8_recipe", job.to_dict(), merge=False, force_add=True)
        return config, False
    for key, value in (("device", device), ("hardware", hardware)):
        if value is not None:
            raise ConfigError(
                f"start() was given {key}={value} beside a configuration, which has its own.",
                key=key,
                value=value,
                hint=f"Set {key}={value} in the configuration.",
            )
    return job, True
