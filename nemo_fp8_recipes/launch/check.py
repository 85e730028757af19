"""Preflight of one node, before torch is imported there."""

from __future__ import annotations

import os
from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from nemo_fp8_recipes import preflight
from nemo_fp8_recipes.errors import PreflightError
from nemo_fp8_recipes.launch.claim import node_name
from nemo_fp8_recipes.launch.plan import Job
from nemo_fp8_recipes.preflight import driver
from nemo_fp8_recipes.preflight.hardware import spelled
from nemo_fp8_recipes.training.settings import read_settings

__all__ = ["check_node", "check_plan"]


def check_plan(job: Job) -> None:
    """What can be said before any node is known: recipe, shapes and versions, for the hardware named.

    Raises:
        PreflightError: the job would fail.
        ConfigError: a value that the job needs is missing.
    """
    if job.payload.kind == "train":
        read_settings(job.config)
        preflight.require(preflight.check_job(job.config, os.environ, emulated=job.emulated))


def check_node(job: Job, found: Sequence[driver.Gpu]) -> None:
    """Check that the job runs on this node, whose GPUs are `found`.

    Raises:
        PreflightError: no GPU, different GPUs, another GPU than `hardware=` names, or one that cannot run the
        recipe at these shapes.
    """
    if job.emulated:
        check_plan(job)
        return
    if not found:
        if str(job.config.device) == "auto" and job.launcher.name == "local":
            return  # one local process: the job itself decides whether to emulate
        raise PreflightError(
            f"Node {node_name()} shows no NVIDIA GPU (no nvidia-smi, or it lists none).",
            key="device",
            value=str(job.config.device),
            hint="To emulate one set device=emulated.",
        )
    _same_gpu(job, found)
    if job.payload.kind == "train":
        gpu = found[0]
        node = {"compute_capability": list(gpu.compute_capability), "display_name": gpu.name}
        if job.config.hardware.name == "auto":
            node["name"] = "found"
        config = OmegaConf.merge(job.config, {"hardware": node})
        assert isinstance(config, DictConfig)
        preflight.require(preflight.check_job(config, os.environ, emulated=False))
    elif not preflight.runs_on(job.recipe.name, found[0].compute_capability):
        raise PreflightError(
            f"fp8_recipe={job.recipe.name} does not run on {found[0].name} of node {node_name()}.",
            key="fp8_recipe",
            value=job.recipe.name,
            allowed=preflight.recipes_for(found[0].compute_capability),
        )


def _same_gpu(job: Job, found: Sequence[driver.Gpu]) -> None:
    capabilities = sorted({gpu.compute_capability for gpu in found})
    if len(capabilities) > 1:
        names = ", ".join(sorted({gpu.name for gpu in found}))
        raise PreflightError(f"Node {node_name()} has different GPUs: {names}.", key="hardware")
    asked = job.config.hardware.compute_capability
    if asked is not None and tuple(asked) != capabilities[0]:
        raise PreflightError(
            f"hardware={job.config.hardware.name} has compute capability {spelled(tuple(asked))}, but node "
            f"{node_name()} has {found[0].name} ({spelled(capabilities[0])}).",
            key="hardware",
            value=job.config.hardware.name,
            hint="Choose the hardware that the nodes have, or ask SLURM for nodes that have it: "
            "launcher.constraint, launcher.partition.",
        )
