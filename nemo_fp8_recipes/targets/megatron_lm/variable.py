"""The environment variable that names the recipe to what runs inside Megatron-LM: factories and hook."""

from __future__ import annotations

import json
from collections.abc import Mapping

from nemo_fp8_recipes import recipes
from nemo_fp8_recipes.errors import RecipeError
from nemo_fp8_recipes.recipes import Recipe
from nemo_fp8_recipes.targets.megatron_lm.options import changed

__all__ = ["RECIPE_VARIABLE", "read", "write"]

RECIPE_VARIABLE = "NEMO_FP8_RECIPE"


def write(recipe: Recipe) -> str:
    """The recipe as one line of JSON: its name and what differs from the defaults."""
    values = recipe.to_dict()
    options = {name: values[name] for name in changed(recipe)}
    return json.dumps({"name": recipe.name, **options}, separators=(",", ":"))


def read(environ: Mapping[str, str]) -> Recipe:
    """The recipe that the variable names: JSON as `write` gives it, or a bare name or alias.

    Raises:
        RecipeError: the variable is not set, or names no recipe.
    """
    text = environ.get(RECIPE_VARIABLE, "").strip()
    if not text:
        raise RecipeError(
            f"{RECIPE_VARIABLE} is not set, so the recipe is not known.",
            key=RECIPE_VARIABLE,
            hint="Take it over from `nemo-fp8 args fp8_recipe=…` into the environment of every process.",
        )
    if not text.startswith("{"):
        return recipes.load(text)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecipeError(
            f"{RECIPE_VARIABLE} is neither a recipe's name nor JSON: {error}.",
            key=RECIPE_VARIABLE,
            value=text,
            hint="Take it over unchanged from `nemo-fp8 args fp8_recipe=…`.",
        ) from error
    return recipes.load(values)
