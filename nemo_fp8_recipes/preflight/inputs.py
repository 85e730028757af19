"""What the rules look at: plain data about the job, the device, the versions and the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nemo_fp8_recipes.preflight.hardware import Capability
from nemo_fp8_recipes.preflight.megatron import MegatronSettings
from nemo_fp8_recipes.preflight.shapes import ModelShape, Parallel
from nemo_fp8_recipes.recipes import Recipe
from nemo_fp8_recipes.recipes.modules import ModuleRecipe

__all__ = ["Hardware", "PreflightInput"]


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The GPU; `capability` is None while nobody knows which it will be."""

    name: str = "auto"
    display_name: str = "auto"
    capability: Capability | None = None
    memory_gb: int | None = None
    """Memory of one GPU."""


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
    megatron_core_version: str | None = None
    nemo_version: str | None = None
    bridge_version: str | None = None
    python_version: str | None = None
    cuda_version: tuple[int, int] | None = None
    """CUDA that torch was built with."""
    environment: Mapping[str, str] = field(default_factory=dict)
    megatron: MegatronSettings = field(default_factory=MegatronSettings)
    megatron_refusal: str | None = None
    """What TransformerConfig's own check says about the fields as they are; None: nothing, or not asked."""
    distributed_optimizer: bool | None = None
    """Megatron's use_distributed_optimizer; None: the job's optimizer is not known."""
    telemetry: bool = False
    """Probes read the quantised tensors of every layer."""
    elsewhere: frozenset[str] = frozenset()
    """Kinds of linear layers, such as "mlp.linear_fc2", that train with another recipe in every layer."""
    modules: tuple[ModuleRecipe, ...] = ()
    """Single modules that train with another recipe, `recipe_modules`."""
    scheduled: bool = False
    """The recipe changes during the job."""
    attention_dropout: float = 0.0
