"""The composed configuration as the typed objects the job works with. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_fp8_recipes import typed
from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.preflight import MegatronSettings
from nemo_fp8_recipes.recipes import Recipe
from nemo_fp8_recipes.recipes.modules import ModuleRecipe, module_recipes_of
from nemo_fp8_recipes.recipes.schedule import Schedule, schedule_of
from nemo_fp8_recipes.telemetry import schema as telemetry_schema
from nemo_fp8_recipes.telemetry.alerts.schema import AlertsConfig
from nemo_fp8_recipes.telemetry.schema import TelemetryConfig
from nemo_fp8_recipes.training.indexed_schema import MegatronIndexedConfig
from nemo_fp8_recipes.training.layout import ParallelSizes
from nemo_fp8_recipes.training.schema import (
    GROUPS,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)

__all__ = ["Settings", "read_settings"]

# Changing these between save and resume is what they are for; everything else must stay as it was saved.
FREE_TO_CHANGE = frozenset({"optimizer.lr_decay_steps", "optimizer.lr_warmup_steps"})


@dataclass(frozen=True)
class Settings:
    """One job: what to train, on what, how, with which recipe."""

    framework: str
    recipe: Recipe
    schedule: Schedule
    modules: tuple[ModuleRecipe, ...]
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    parallel: ParallelSizes
    telemetry: TelemetryConfig
    megatron: MegatronSettings
    alerts: AlertsConfig
    device: str
    hardware: dict[str, Any]
    run_dir: str | None

    def job_identity(self, *, data_fingerprint: str, world_size: int) -> dict[str, Any]:
        """What a resumed job must share with the one that saved: dotted key -> plain value."""
        groups: dict[str, dict[str, Any]] = {
            "model": asdict(self.model),
            "fp8_recipe": self.recipe.to_dict(),
            "recipe_modules": {str(index): str(entry) for index, entry in enumerate(self.modules)},
            "optimizer": asdict(self.optimizer),
            "parallel": asdict(self.parallel),
            "training": {
                key: getattr(self.training, key) for key in ("global_batch_size", "micro_batch_size", "seed")
            },
        }
        identity = {
            f"{group}.{key}": value for group, values in groups.items() for key, value in values.items()
        }
        identity["framework"] = self.framework
        identity["data.name"] = self.data.name
        identity["data.fingerprint"] = data_fingerprint
        identity["processes"] = world_size
        return {key: value for key, value in identity.items() if key not in FREE_TO_CHANGE}


def read_settings(config: DictConfig) -> Settings:
    """Turn a composed configuration into `Settings`.

    Raises:
        ConfigError: a value has the wrong type or cannot work; names its key.
        RecipeError: the recipe does not exist or cannot take its options.
    """
    schedule = schedule_of(config)
    data = _typed("data", config.data)
    if isinstance(data, MegatronIndexedConfig):
        data.require_files()
    return Settings(
        framework=_typed("framework", config.framework).name,
        recipe=schedule.main,
        schedule=schedule,
        modules=module_recipes_of(config, schedule),
        model=_typed("model", config.model),
        data=data,
        optimizer=_typed("optimizer", config.optimizer),
        training=_typed("training", config.training),
        parallel=_parallel(_plain(config.parallel)),
        telemetry=_typed("telemetry", config.telemetry),
        megatron=typed.read(MegatronSettings, _plain(config.megatron), key="megatron", error=ConfigError),
        alerts=_typed("alerts", config.alerts),
        device=str(config.device),
        hardware=_plain(config.hardware),
        run_dir=config.run_dir,
    )


def _plain(node: DictConfig) -> dict[str, Any]:
    container = OmegaConf.to_container(node, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _parallel(values: dict[str, Any]) -> ParallelSizes:
    values.pop("name", None)
    values.pop("ep", None)  # dense models have no experts to cut; preflight says so
    return typed.read(ParallelSizes, values, key="parallel", error=ConfigError)


def _typed(group: str, node: DictConfig) -> Any:
    schema = {**GROUPS, **telemetry_schema.GROUPS}[group]
    values = _plain(node)
    if isinstance(schema, dict):
        name = values.get("name")
        if name not in schema:
            raise ConfigError(
                f"{group}.name={name} is not available.", key=f"{group}.name", value=name, allowed=schema
            )
        schema = schema[name]
    return typed.read(schema, values, key=group, error=ConfigError)
