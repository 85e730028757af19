"""What the rules look at: plain data about the job, the device, the versions and the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nemo_fp8_recipes.preflight.hardware import Capability
from nemo_fp8_recipes.preflight.shapes import ModelShape, Parallel
from nemo_fp8_recipes.recipes import Recipe

__all__ = ["Hardware", "PreflightInput"]


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The GPU; `capability` is None while nobody knows which it will be."""

    name: str = "auto"
    display_name: str = "auto"
    capability: Capability | None = None


@dataclass(frozen=True, kw_only=True)
class PreflightInput:
    """A job as plain data. What is None or empty is unknown, and rules that need it stay silent."""

    recipe: Recipe
    hardware: Hardware = field(default_factory=Hardware)
    model: ModelShape | None = None
    parallel: Parallel = field(default_factory=Parallel)
    emulated: bool = False
    """The job runs on the emulated device."""
    runs_here: bool = True
    """The job runs on this machine, with the packages installed here."""
    te_version: str | None = None
    cuda_version: tuple[int, int] | None = None
    """CUDA that torch was built with."""
    environment: Mapping[str, str] = field(default_factory=dict)
    recompute_modules: tuple[str, ...] = ()
    """Megatron's recompute_modules, where recompute_granularity is selective."""
    offload_modules: tuple[str, ...] = ()
    """Megatron's offload_modules, where fine_grained_activation_offloading is on."""
