"""Changing the recipe of a model between two training steps.

Three things change together: what injection answers, the fields of Megatron's config that say when and where
an FP8 context is entered, and the quantizers and scaling state that Transformer Engine's modules keep. The
optimizer's own copy of the recipe's name matters only to weights stored quantised, and their recipe stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from nemo_fp8_recipes.errors import InjectionError
from nemo_fp8_recipes.injection.config_check import check_config
from nemo_fp8_recipes.injection.module_names import model_chunks
from nemo_fp8_recipes.injection.state import reset_quantization_state

if TYPE_CHECKING:
    from torch import nn

    from nemo_fp8_recipes.injection.context import Injection
    from nemo_fp8_recipes.recipes import Recipe

__all__ = ["check_switchable", "set_fields", "switch"]

_OFF = {"first_last_layers_bf16": False, "tp_only_amax_red": False}
"""Fields that a recipe without such an option means by leaving them out."""

_FIXED_WHEN_BUILT = {
    "cuda_graph_impl": "none",
    "enable_cuda_graph": False,
    "external_cuda_graph": False,
    "tp_comm_overlap": False,
}
"""Config fields that tie a model to the recipe it started with, and the value that does not: a captured graph
replays the recipe it was captured with; TP communication buffers are registered for one quantisation mode
(`transformer_engine/pytorch/module/base.py`, `initialize_ub`)."""


class _Changed:
    """A config as it will be once some of its fields are set."""

    def __init__(self, config: Any, fields: dict[str, Any]) -> None:
        self._config = config
        self.__dict__.update(fields)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def check_switchable(config: Any, recipes: Sequence[Recipe]) -> None:
    """Check, before a model is built from `config`, that it can train with each of `recipes` in turn.

    Raises:
        InjectionError: Megatron ties the model to one recipe, or one of them cannot run with this config.
    """
    for field, free in _FIXED_WHEN_BUILT.items():
        value = getattr(config, field, None)
        if value is not None and value != free:
            raise InjectionError(
                f"A model built with {field}={value} keeps the recipe that it started with.",
                key=field,
                value=value,
                allowed=[free],
                hint=f"Set {field}={free}, or train with one recipe.",
            )
    for recipe in recipes:
        check_config(recipe, _Changed(config, _fields(recipe)))


def set_fields(model: nn.Module | Sequence[nn.Module], recipe: Recipe) -> None:
    """Make every Megatron config that the model's modules hold name `recipe`."""
    for config in _configs(model):
        for field, value in _fields(recipe).items():
            setattr(config, field, value)


def switch(injection: Injection, model: nn.Module | Sequence[nn.Module], recipe: Recipe) -> None:
    """Train with another recipe from the next step on. Call it between steps, on every rank.

    Delayed scaling starts with empty histories; parameters, gradients and optimizer state are left alone.

    Args:
        injection: what `inject` yielded.
        model: every chunk of the model that this process trains.
        recipe: the new recipe.

    Raises:
        InjectionError: inside a Transformer Engine context, weights are stored quantised, or modules outside
            `model` share its delayed-scaling buffers. Nothing has changed then.
    """
    reset_quantization_state(model)
    set_fields(model, recipe)
    injection.use(recipe)


def _fields(recipe: Recipe) -> dict[str, Any]:
    return {**_OFF, **recipe.megatron()}


def _configs(model: nn.Module | Sequence[nn.Module]) -> Iterator[Any]:
    """Each config object once; Megatron's modules share one, some hold copies."""
    seen: set[int] = set()
    for chunk in model_chunks(model):
        for module in chunk.modules():
            config = getattr(module, "config", None)
            if hasattr(config, "fp8") and id(config) not in seen:
                seen.add(id(config))
                yield config
