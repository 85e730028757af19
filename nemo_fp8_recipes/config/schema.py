"""The typed shape of the whole configuration: every part's own dataclasses, gathered."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_fp8_recipes import recipes, typed
from nemo_fp8_recipes.errors import ConfigError, nearest
from nemo_fp8_recipes.launch import schema as launch_schema
from nemo_fp8_recipes.preflight.megatron import MegatronSettings
from nemo_fp8_recipes.recipes.modules import ModulesConfig, read_module_recipes
from nemo_fp8_recipes.recipes.schedule import SpanConfig, read_schedule
from nemo_fp8_recipes.targets import versions
from nemo_fp8_recipes.telemetry import schema as telemetry_schema
from nemo_fp8_recipes.training import schema as training_schema

__all__ = [
    "GROUPS",
    "HardwareConfig",
    "ParallelConfig",
    "PreflightConfig",
    "RootConfig",
    "VersionsConfig",
    "read",
    "validate",
]


@dataclass
class ParallelConfig:
    """How the model is cut over the processes; what is left of the world is data parallelism."""

    name: str
    tp: int = 1
    """Tensor parallelism: ranks that share each weight matrix."""
    pp: int = 1
    """Pipeline parallelism: stages that share the layers."""
    cp: int = 1
    """Context parallelism: ranks that share each sequence."""
    ep: int = 1
    """Expert parallelism: ranks that share the experts of a layer."""
    sequence: bool = False
    """Sequence parallelism: norms and residuals split over the tensor-parallel ranks."""

    def __post_init__(self) -> None:
        for key in ("tp", "pp", "cp", "ep"):
            if getattr(self, key) < 1:
                raise ConfigError(
                    f"parallel.{key}={getattr(self, key)} is out of range.",
                    key=f"parallel.{key}",
                    value=getattr(self, key),
                    allowed=[">= 1"],
                )
        if self.sequence and self.tp == 1:
            raise ConfigError(
                "parallel.sequence=true splits activations over tensor-parallel ranks, and parallel.tp=1.",
                key="parallel.sequence",
                value=True,
                hint="Set parallel.tp to 2 or more.",
            )


@dataclass
class HardwareConfig:
    """The GPU a job is for; `auto` stands for the one that is found, and knows nothing."""

    name: str
    display_name: str
    compute_capability: tuple[int, int] | None = None
    """Major and minor, as torch.cuda.get_device_capability gives it."""
    memory_gb: int | None = None
    """Memory of one GPU."""
    gpus_per_node: int | None = None

    def __post_init__(self) -> None:
        if self.name != "auto" and self.compute_capability is None:
            raise ConfigError(
                f"hardware.compute_capability is missing for hardware={self.name}.",
                key="hardware.compute_capability",
                allowed=["[major, minor]"],
            )


@dataclass
class PreflightConfig:
    """Which findings shall not stop the job."""

    ignore: list[str] = field(default_factory=list)


@dataclass
class VersionsConfig:
    """Versions that preflight shall assume instead of the installed ones."""

    te: str | None = None
    megatron_core: str | None = None
    nemo: str | None = None
    bridge: str | None = None
    cuda: str | None = None
    """Of the torch build."""
    python: str | None = None

    def __post_init__(self) -> None:
        for field_ in dataclasses.fields(self):
            value = getattr(self, field_.name)
            if value is not None and not versions.parse(value):
                raise ConfigError(
                    f"versions.{field_.name}={value} is no version.",
                    key=f"versions.{field_.name}",
                    value=value,
                    allowed=["a version such as '2.4'"],
                )


@dataclass
class RootConfig:
    """The keys outside the groups."""

    device: Literal["auto", "native", "emulated"] = "auto"
    run_dir: str | None = None
    recipe_modules: list[ModulesConfig] = field(default_factory=list)
    recipe_schedule: list[SpanConfig] = field(default_factory=list)
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    versions: VersionsConfig = field(default_factory=VersionsConfig)
    debug: bool = False


# One schema a group; where the choices of a group have different keys, one schema a choice.
GROUPS: dict[str, type[Any] | Mapping[str, type[Any]]] = {
    **training_schema.GROUPS,
    **telemetry_schema.GROUPS,
    **launch_schema.GROUPS,
    "parallel": ParallelConfig,
    "hardware": HardwareConfig,
    "megatron": MegatronSettings,
}


def read(group: str, values: Mapping[str, Any]) -> Any:
    """The values of a group as its dataclass.

    Raises:
        ConfigError: for an unknown key, a wrong type or an impossible value.
    """
    schema = GROUPS[group]
    if isinstance(schema, Mapping):
        name = str(values.get("name"))
        if name not in schema:
            close = nearest(name, schema)
            raise ConfigError(
                f"{group}.name={name} is not available.",
                key=f"{group}.name",
                value=name,
                allowed=schema,
                hint=f"Did you mean '{close}'?" if close else None,
            )
        schema = schema[name]
    return typed.read(schema, values, key=group, error=ConfigError)


def validate(config: DictConfig) -> None:
    """Check every value of a composed configuration.

    Raises:
        ConfigError, RecipeError: for the first one that is unknown, of the wrong type or impossible.
    """
    try:
        values = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", "") or "")
        detail = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(f"{key or 'A value'} cannot be resolved: {detail}.", key=key or None) from error
    assert isinstance(values, dict)
    root = {str(key): value for key, value in values.items()}
    checked: dict[str, Any] = {}
    for group in ("fp8_recipe", *GROUPS):
        node = root.pop(group, None)
        if not isinstance(node, dict):
            raise ConfigError(f"{group} is missing.", key=group, hint=f"Choose one: {group}=choice.")
        if group == "fp8_recipe":
            recipe = recipes.load(node)
        else:
            checked[group] = read(group, node)
    rest = typed.read(RootConfig, root, key="", error=ConfigError)
    schedule = read_schedule(rest.recipe_schedule, recipe, checked["training"].steps)
    read_module_recipes(rest.recipe_modules, schedule)
