"""Overrides in, checked configuration out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig
from omegaconf.errors import OmegaConfBaseException

from nemo_fp8_recipes import recipes, typed
from nemo_fp8_recipes.config.overrides import RECIPE_GROUP, parse, translate
from nemo_fp8_recipes.config.paths import ROOT_CONFIG, conf_dir, groups
from nemo_fp8_recipes.config.scale import tiny
from nemo_fp8_recipes.config.schema import validate
from nemo_fp8_recipes.errors import ConfigError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

__all__ = ["compose"]


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration of a job: conf/config.yaml with `overrides` applied, every value checked.

    Args:
        overrides: Hydra overrides, `group=choice` and `group.key=value`.

    Raises:
        ConfigError, RecipeError: naming the key, the value, what is allowed and the nearest spelling.
    """
    parsed = parse(overrides)
    try:
        config = _hydra(translate(parsed))
    except (HydraException, OmegaConfBaseException) as error:
        raise _diagnose(parsed, error) from error
    _refuse_deletions(parsed)
    validate(config)
    if config.model.scale == "tiny":
        _cut_down(config, given={override.key_or_group for override in parsed})
        validate(config)
    return config


def _cut_down(config: DictConfig, given: set[str]) -> None:
    """Put model.scale=tiny into effect; sizes that the user gave stay."""
    for key, value in tiny(config.model).items():
        if f"model.{key}" not in given:
            config.model[key] = value


def _hydra(overrides: list[str]) -> DictConfig:
    """Hydra's own composition; a Hydra application around us keeps its state."""
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
            return hydra.compose(config_name=ROOT_CONFIG, overrides=overrides)
    finally:
        GlobalHydra.instance().hydra = outer


def _diagnose(overrides: Sequence[Override], error: Exception) -> ConfigError:
    """Hydra's error said in terms of the key at fault: nearly always one that does not exist."""
    choices = [override for override in overrides if override.key_or_group in groups()]
    config = _hydra(translate(choices))
    for override in overrides:
        if override.key_or_group not in groups() and not override.is_add():
            _check_key(config, override)
    _refuse_deletions(overrides)
    return ConfigError(f"The configuration does not compose: {str(error).splitlines()[0].rstrip('.')}.")


def _refuse_deletions(overrides: Sequence[Override]) -> None:
    """Raise for an override that takes a key away: parts of the job read it from the configuration."""
    for override in overrides:
        if override.is_delete():
            key = override.key_or_group
            raise ConfigError(
                f"{key} needs a value, and '~{key}' takes it away.",
                key=key,
                value=override.input_line,
                hint=f"Write {key}=value, or leave {key} out for its default.",
            )


def _check_key(config: DictConfig, override: Override) -> None:
    """Raise for a dotted key that the composed configuration lacks, or that holds another kind of value."""
    node: Any = config
    path = ""
    for part in override.key_or_group.split("."):
        if not isinstance(node, DictConfig):
            raise ConfigError(
                f"There is no key '{override.key_or_group}': {path} is a single value.",
                key=override.key_or_group,
                hint=f"Write {path}=value.",
            )
        if part not in node:
            if path == RECIPE_GROUP:
                recipes.load(str(config[RECIPE_GROUP].name), **{part: override.value()})
            if not node:
                raise ConfigError(
                    f"There is no key '{override.key_or_group}': {path} is empty.",
                    key=override.key_or_group,
                    hint=f"A plus adds to it: +{override.key_or_group}=….",
                )
            raise typed.unknown_key(part, [str(key) for key in node], path, ConfigError)
        path = f"{path}.{part}" if path else part
        node = node[part]
    if isinstance(node, ListConfig | DictConfig):  # Hydra merges them with their own kind alone
        kind = list[Any] if isinstance(node, ListConfig) else dict[Any, Any]
        typed.coerce(override.value(), kind, path, ConfigError)
