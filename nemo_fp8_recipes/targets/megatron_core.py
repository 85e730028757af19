"""A recipe as fields of Megatron-Core's `TransformerConfig`.

Megatron's own defaults (delayed, a history of 1, most_recent, one BF16 layer at each end) are never relied
on: every field that belongs to the recipe is given. Megatron cannot express the rest of the recipe's options;
those reach TE through injection. Written against megatron-core 0.15 and 0.16.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from nemo_fp8_recipes.recipes.base import QuantizedRecipe, Recipe
from nemo_fp8_recipes.recipes.nvfp4 import Nvfp4

__all__ = ["fields", "hidden_options"]


def fields(recipe: Recipe) -> dict[str, Any]:
    """`TransformerConfig` fields that make Megatron choose this recipe and place it."""
    if not isinstance(recipe, QuantizedRecipe):
        return {"fp8": None, "fp4": None}
    if isinstance(recipe, Nvfp4):
        named: dict[str, Any] = {"fp8": None, "fp4": recipe.fp4_format, "fp4_recipe": recipe.name}
    else:
        named = {"fp8": recipe.fp8_format, "fp8_recipe": recipe.name, "fp4": None}
    carried = {
        field.metadata["megatron"]: getattr(recipe, field.name)
        for field in dataclasses.fields(recipe)
        if field.metadata["megatron"] is not None
    }
    return {**named, **carried, "first_last_layers_bf16": recipe.layers_in_bf16 > 0}


def hidden_options(recipe: Recipe) -> dict[str, Any]:
    """Options that differ from their default and that no `TransformerConfig` field carries."""
    return {
        field.name: getattr(recipe, field.name)
        for field in dataclasses.fields(recipe)
        if field.metadata["megatron"] is None
        and field.name != "fp8_format"
        and getattr(recipe, field.name) != field.default
    }
