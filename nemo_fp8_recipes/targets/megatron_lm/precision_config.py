"""The file that `--te-precision-config-file` takes: another precision for modules whose path matches a glob.

Format: megatron/core/quantization/quant_config.py (ordered matchers) and TEQuantizationRecipe in
megatron/core/extensions/transformer_engine.py (what a matched module does).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo_fp8_recipes import recipes
from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.recipes import Recipe
from nemo_fp8_recipes.recipes.modules import ModuleRecipe

__all__ = ["precision_config", "training_recipe"]


def precision_config(recipe: Recipe, modules: Sequence[ModuleRecipe]) -> dict[str, Any]:
    """The file's content, the first matching glob first.

    Args:
        recipe: what every other module trains with.
        modules: the exceptions.

    Raises:
        ConfigError: an exception that Megatron cannot make: delayed scaling for one module, a quantised
            module in a model that trains with delayed scaling, options that its file has no field for.
    """
    configs: dict[str, Any] = {}
    matchers: dict[str, Any] = {}
    for number, module in enumerate(modules):
        configs[module.recipe] = {
            "transformer_engine_config_type": "TEQuantizationParams",
            "training_recipe": training_recipe(recipe, module),
        }
        matchers[f"module_{number}"] = {
            "config": module.recipe,
            "type": "glob",
            "pattern": module.pattern,
            "enabled": True,
        }
    return {"configs": configs, "matchers": matchers}


def training_recipe(recipe: Recipe, module: ModuleRecipe) -> dict[str, Any]:
    """The fields of Megatron's TEQuantizationRecipe that give `module` its recipe.

    Raises:
        ConfigError: see `precision_config`.
    """
    theirs = recipes.load(module.recipe)
    if theirs.name == "delayed":
        raise _refusal(module, "Megatron cannot use delayed scaling for single modules")
    if theirs.precision != "bf16" and recipe.name == "delayed":
        raise _refusal(
            module, "a model that trains with delayed scaling can have single modules in bf16 only"
        )
    training: dict[str, Any] = {}
    if theirs.precision == "fp8":
        training = {"fp8_quantization_recipe": theirs.name, "fp8_format": theirs.megatron()["fp8"]}
    elif theirs.precision == "fp4":
        training = {"fp4_quantization_recipe": theirs.name}
    if training:
        # Also where the surrounding layer is in BF16.
        training["override_nonquantized_autocast"] = True
    lost = [
        name
        for name, value in theirs.to_dict().items()
        if name not in ("fp8_format", "schema_version", "name") and value != _plain(theirs.name)[name]
    ]
    if lost:
        raise _refusal(module, f"Megatron has no field for {', '.join(lost)} of {module.recipe}")
    return training


def _plain(name: str) -> dict[str, Any]:
    return recipes.load(name).to_dict()


def _refusal(module: ModuleRecipe, reason: str) -> ConfigError:
    return ConfigError(
        f"{module.key} {module} is not possible: {reason}.",
        key=module.key,
        value=str(module),
        allowed=["bf16", "tensorwise", "blockwise", "mxfp8", "nvfp4"],
    )
