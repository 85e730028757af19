"""What a training program does first: recipe, preflight, device, in that order and before torch is imported.

The reference job starts this way, and so does a script of your own:

    config = compose(sys.argv[1:])
    job = fp8.start(config)
    print(job.recipe.name, "on", job.device.label)
    import torch, megatron.core          # from here on the device is in place, emulated or not
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from nemo_fp8_recipes import emulation, preflight, recipes

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
    """

    recipe: Recipe
    device: EmulatedDevice | NativeDevice
    findings: tuple[Finding, ...]


def start(config: DictConfig, environ: Mapping[str, str] = os.environ) -> Start:
    """Check the job and put its device in place. Call it before Transformer Engine or Megatron is imported.

    Args:
        config: what `config.compose` returned.
        environ: the process environment, which says whether torchrun or SLURM started this process.

    Raises:
        PreflightError: the job would fail; nothing has been built.
        EmulationError: the device asked for cannot be had here.
        RecipeError: the recipe cannot take its options.
    """
    recipe = recipes.load(config.fp8_recipe)
    emulated = emulation.should_start(str(config.device), environ)
    findings = preflight.check_job(config, environ, emulated=emulated)
    preflight.require(findings)
    hardware: dict[str, Any] = OmegaConf.to_container(config.hardware, resolve=True)  # type: ignore[assignment]  # a group is a mapping
    if emulated:
        hardware["name"] = preflight.posing_device(recipe, hardware["name"])
    device = emulation.switch(str(config.device), hardware, environ)
    if not emulated:
        # Only now is it known which GPU `hardware=auto` is.
        found = preflight.Hardware(
            name="auto", display_name=device.label, capability=device.compute_capability
        )
        findings = preflight.check_job(config, environ, emulated=False, found=found)
        preflight.require(findings)
    return Start(recipe, device, tuple(findings))
