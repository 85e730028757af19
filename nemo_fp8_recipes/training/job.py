"""The job `nemo-fp8 train` runs, in the order that lets each thing fail as early as it can.

configuration -> preflight -> device (emulated or native) -> processes -> data -> run directory -> model ->
resume -> steps -> held-out loss -> report. Nothing heavier than OmegaConf is imported before the device is
chosen.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from omegaconf import DictConfig, OmegaConf

from nemo_fp8_recipes.config import alias_notes
from nemo_fp8_recipes.preflight import Finding
from nemo_fp8_recipes.recipes.modules import recipes_of
from nemo_fp8_recipes.startup import Start, start
from nemo_fp8_recipes.training import frameworks
from nemo_fp8_recipes.training.invocation import Invocation
from nemo_fp8_recipes.training.layout import check_layout
from nemo_fp8_recipes.training.memory import memory_said
from nemo_fp8_recipes.training.primary_weights import check_primary_weights
from nemo_fp8_recipes.training.settings import Settings, read_settings
from nemo_fp8_recipes.training.unsupported import check_supported
from nemo_fp8_recipes.training.versions import installed_versions

__all__ = ["check", "run_job"]


def run_job(config: DictConfig, *, command: Sequence[str], overrides: Sequence[str]) -> int:
    """Run the job `config` describes; returns the exit status: 0, or 128 + the signal that stopped it.

    Args:
        config: what `config.compose` returned.
        command: the command line as typed, for the record in `run.json`.
        overrides: the configuration overrides in it.

    Raises:
        Fp8Error: whatever the user can put right; its subclass says what kind of thing it is.
    """
    settings, framework = check(config)
    job = start(config)

    # torch, Megatron-Core and Transformer Engine are imported from here on: the device is in place.
    invocation = Invocation(
        command=command,
        overrides=overrides,
        config_yaml=OmegaConf.to_yaml(config, resolve=True),
        versions=installed_versions(framework.distribution),
        device_label=job.device.label,
        emulated=job.device.emulated,
        notes=(*alias_notes(overrides), *_worth_saying(job.findings), *_compiler_note(job)),
    )
    with memory_said():
        return framework.load()(settings, invocation)


def check(config: DictConfig) -> tuple[Settings, frameworks.Framework]:
    """Read the settings of a job and check what can be checked before preflight, without torch.

    Raises:
        ConfigError, RecipeError: the job cannot run as it is configured.
    """
    settings = read_settings(config)
    framework = frameworks.find(settings.framework)
    framework.require_one_recipe(settings)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    check_layout(settings.model, settings.training, settings.parallel, processes)
    check_primary_weights(settings.recipe)
    check_supported(settings.megatron, settings.training)
    return settings, framework


def _worth_saying(findings: Iterable[Finding]) -> list[str]:
    """What preflight found that does not stop the job, a line each."""
    return [f"{found.severity} [{found.code}] {found.sentence()}" for found in findings]


def _compiler_note(job: Start) -> list[str]:
    """That the first step of an emulated job waits for the compiler, where it does."""
    quantises = any(recipe.precision != "bf16" for recipe in (job.recipe, *recipes_of(job.modules)))
    if not (job.device.emulated and quantises):
        return []
    from nemo_fp8_recipes.emulation import kernels

    if not kernels.must_compile():
        return []
    return ["The first step compiles the emulated device's kernels, once on this machine: some seconds."]
