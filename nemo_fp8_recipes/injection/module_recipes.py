"""Single modules with a recipe of their own, on a built model.

Megatron's Transformer Engine layers hold `te_quant_params` and enter an FP8 context of their own by it
(megatron/core/extensions/transformer_engine.py, `_get_fp8_autocast_for_quant_params`). Megatron fills it from
`config.quant_recipe` by each module's path on its pipeline stage. Here it is set on the built model, by the
path in the whole model, so that a glob means the same layers however the model is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_fp8_recipes.errors import InjectionError
from nemo_fp8_recipes.injection.module_names import model_chunks, named_modules
from nemo_fp8_recipes.injection.peers import derives_from
from nemo_fp8_recipes.targets.megatron_lm.precision_config import training_recipe

if TYPE_CHECKING:
    from torch import nn

    from nemo_fp8_recipes.recipes import Recipe
    from nemo_fp8_recipes.recipes.modules import ModuleRecipe

__all__ = ["assign_module_recipes", "megatrons_module_recipes"]


def assign_module_recipes(
    model: nn.Module | Sequence[nn.Module], recipe: Recipe, modules: Sequence[ModuleRecipe]
) -> None:
    """Let the modules that `modules` name train with the recipes given there.

    Args:
        model: the model, wrapped or not, or Megatron's list of virtual-pipeline chunks.
        recipe: what all other modules train with.
        modules: the first entry that matches a module's path decides.

    Raises:
        InjectionError: this Megatron-Core has no recipes for single modules, or its config names some.
        ConfigError: a recipe that Megatron cannot give to single modules.
    """
    if not modules:
        return
    try:
        from megatron.core.extensions.transformer_engine import TEQuantizationParams, TEQuantizationRecipe
    except ImportError as error:
        raise InjectionError(
            "This Megatron-Core gives no recipe to single modules.",
            key=modules[0].key,
            value=str(modules[0]),
            hint="Install megatron-core 0.16 or newer.",
        ) from error
    if _in_config(model):
        raise InjectionError(
            "Megatron's config names recipes for single modules already (quant_recipe).",
            key=modules[0].key,
            value=str(modules[0]),
            hint="Name them in one place.",
        )
    asked = {
        entry: TEQuantizationParams(
            training_recipe=TEQuantizationRecipe.parse_from_config(training_recipe(recipe, entry)),
            evaluation_recipe=None,
        )
        for entry in modules
    }
    for named in named_modules(model):
        if not derives_from(named.module, "transformer_engine", "TransformerEngineBaseModule"):
            continue
        if not hasattr(named.module, "te_quant_params"):
            continue  # attention: Megatron knows recipes for linear layers only
        for entry, params in asked.items():
            if entry.matches(named.path):
                named.module.te_quant_params = params
                break


def megatrons_module_recipes(model: nn.Module | Sequence[nn.Module]) -> dict[str, str]:
    """Module -> recipe in training, of the modules to which Megatron's config (`quant_recipe`) gives one.

    The name is the canonical one, as Megatron's own; "bf16", or "custom" for a factory of the user's.
    """
    if not _in_config(model):
        return {}
    found = {}
    for named in named_modules(model):
        params = getattr(named.module, "te_quant_params", None)
        if params is not None:
            training = params.training_recipe
            name = training.fp8_quantization_recipe or training.fp4_quantization_recipe or "bf16"
            found[named.path] = str(getattr(name, "value", name))
    return found


def _in_config(model: nn.Module | Sequence[nn.Module]) -> bool:
    """Whether Megatron's precision config gives single modules a recipe of their own."""
    return any(getattr(getattr(chunk, "config", None), "quant_recipe", None) for chunk in model_chunks(model))
