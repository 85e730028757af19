"""The recipe as Bridge's `MixedPrecisionConfig`: Bridge itself puts it into model, optimizer and wrapper.

`pretrain()` calls `setup` on it before anything is built. That is the moment at which the user's own settings
are checked against the recipe and, where Megatron's config cannot express the recipe, its Transformer Engine
object is injected.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.bridge.training.mixed_precision import MixedPrecisionConfig

from nemo_fp8_recipes import recipes
from nemo_fp8_recipes.callbacks.bridge import active
from nemo_fp8_recipes.errors import InjectionError
from nemo_fp8_recipes.recipes import Recipe
from nemo_fp8_recipes.targets import bridge

__all__ = ["Fp8MixedPrecision", "mixed_precision"]

_DTYPES = ("params_dtype", "pipeline_dtype", "autocast_dtype")
_KINDS = ("fp8", "fp8_recipe", "fp4", "fp4_recipe")


@dataclass(kw_only=True)
class Fp8MixedPrecision(MixedPrecisionConfig):
    """Bridge's mixed precision with one of our recipes. Made by `mixed_precision`, or from YAML.

    Attributes:
        recipe: the recipe as a mapping, `Recipe.to_dict()`: every option, also those that no other field has.
        tp_only_amax_red: copied to Megatron's config, where Bridge's own class has no such field.
    """

    recipe: dict[str, Any] = field(default_factory=lambda: {"name": "bf16"})
    tp_only_amax_red: bool = False

    def finalize(self) -> None:
        """Bridge calls it before `setup`. Dtypes that came from YAML are names still."""
        for name in _DTYPES:
            value = getattr(self, name)
            if isinstance(value, str):
                setattr(self, name, getattr(torch, value.removeprefix("torch.")))
        super().finalize()

    def load_recipe(self) -> Recipe:
        """The recipe this stands for.

        Raises:
            InjectionError: a field was changed and no longer says what the recipe says.
        """
        recipe = recipes.load(self.recipe)
        for name, wanted in bridge.fields(recipe).items():
            found = getattr(self, name, wanted)
            if name in _DTYPES:
                found = str(found).removeprefix("torch.")
            if found != wanted:
                raise InjectionError(
                    f"mixed_precision.{name}={found} while its recipe '{recipe.name}' says {name}={wanted}.",
                    key=f"mixed_precision.{name}",
                    value=found,
                    allowed=[wanted],
                    hint="Change the recipe's option instead (`nemo-fp8 show --bridge-yaml` writes it), or "
                    "take the field out.",
                )
        return recipe

    def setup(self, model_config: Any, optimizer_config: Any = None, ddp_config: Any = None) -> None:
        """Bridge calls it at the start of `pretrain()`, with the configs the job will be built from.

        Raises:
            InjectionError: the model config or this object contradicts the recipe, or the recipe cannot be
                injected (Transformer Engine is missing, another injection is active).
        """
        recipe = self.load_recipe()
        _refuse_own_settings(model_config, bridge.fields(recipe), recipe)
        super().setup(model_config, optimizer_config, ddp_config)
        active.begin(recipe, model_config, optimizer_config, ddp_config)


def mixed_precision(recipe: str | Recipe, **options: Any) -> Fp8MixedPrecision:
    """A recipe as a `MixedPrecisionConfig`: `cfg.mixed_precision = mixed_precision("delayed", margin=1)`.

    Raises:
        RecipeError: unknown recipe or option.
    """
    loaded = recipes.load(recipe, **options)
    known = {item.name for item in dataclasses.fields(Fp8MixedPrecision)}
    values = {name: value for name, value in bridge.fields(loaded).items() if name in known}
    for name in ("fp8_recipe", "fp4_recipe"):
        if values.get(name) is None:
            values.pop(name, None)  # of a precision that is off; Bridge's default says nothing then
    return Fp8MixedPrecision(recipe=loaded.to_dict(), **values)


def _refuse_own_settings(model_config: Any, fields: dict[str, Any], recipe: Recipe) -> None:
    """Bridge would overwrite the user's `model.fp8=…` without a word."""
    config = getattr(model_config, "transformer", model_config)
    for precision in ("fp8", "fp4"):
        if getattr(config, precision, None) is None:
            continue
        for name in (precision, f"{precision}_recipe"):
            found, wanted = getattr(config, name, None), fields.get(name)
            found = getattr(found, "value", found)
            if found != wanted:
                raise InjectionError(
                    f"The model config says {name}={found}, and mixed_precision brings the recipe "
                    f"'{recipe.name}' with {name}={'null' if wanted is None else wanted}.",
                    key=f"model.{name}",
                    value=found,
                    allowed=["null" if wanted is None else wanted],
                    hint=f"Leave model.{precision} out of the model config: the recipe sets it.",
                )
