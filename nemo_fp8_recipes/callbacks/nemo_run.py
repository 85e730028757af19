"""The callback for NeMo-Run: as `run.Config`, in one line for a recipe, and for its command line.

recipe = add_fp8(llm.nemotron3_4b.pretrain_recipe(num_nodes=1), "mxfp8")

nemo llm pretrain --factory "nemo_fp8_recipes.callbacks.nemo_run.pretrain(base=nemotron3_4b,fp8_recipe=mxfp8)"
nemo llm pretrain --factory nemotron3_4b trainer.callbacks=[nemo_fp8_recipes.callbacks.nemo_run.mxfp8]
"""

# No `from __future__ import annotations`: NeMo-Run reads the annotations of factories.

import importlib
from collections.abc import Mapping
from typing import Any

import nemo_run as run
from nemo.collections import llm

from nemo_fp8_recipes import recipes
from nemo_fp8_recipes.callbacks.nemo import Fp8RecipeCallback
from nemo_fp8_recipes.errors import ConfigError, nearest

__all__ = [
    "add_fp8",
    "blockwise",
    "callback",
    "delayed",
    "mxfp8",
    "nvfp4",
    "pretrain",
    "tensorwise",
]


def callback(
    fp8_recipe: str = "mxfp8", options: Mapping[str, Any] | None = None, **arguments: Any
) -> run.Config[Fp8RecipeCallback]:
    """`run.Config` of the callback; the recipe is checked now, not when the job starts.

    Args:
        fp8_recipe: name, alias or preset.
        options: options of the recipe.
        arguments: further arguments of `Fp8RecipeCallback`, such as `run_dir` and `log_every`.

    Raises:
        RecipeError: there is no such recipe, or it cannot take its options.
    """
    recipes.load(fp8_recipe, **dict(options or {}))
    return run.Config(
        Fp8RecipeCallback, fp8_recipe=fp8_recipe, options=dict(options) if options else None, **arguments
    )


def add_fp8(
    recipe: run.Partial[Any], fp8_recipe: str, options: Mapping[str, Any] | None = None, **arguments: Any
) -> run.Partial[Any]:
    """A NeMo-Run pre-training recipe, the same object, with the callback in its trainer.

    The recipe's own precision plugin stays: one that says nothing of FP8 is given the fields when the job
    starts, and one that says FP8 otherwise is an error then.
    """
    callbacks = list(getattr(recipe.trainer, "callbacks", None) or ())
    recipe.trainer.callbacks = [*callbacks, callback(fp8_recipe, options, **arguments)]
    return recipe


@run.cli.factory(target=llm.pretrain, name="fp8")
def pretrain(base: str = "nemotron3_4b", fp8_recipe: str = "mxfp8") -> run.Partial[Any]:
    """NeMo's pre-training recipe `base`, as it is, trained with `fp8_recipe`.

    Raises:
        ConfigError: NeMo has no recipe of that name.
    """
    try:
        module = importlib.import_module(f"nemo.collections.llm.recipes.{base}")
        factory = module.pretrain_recipe
    except (ModuleNotFoundError, AttributeError) as error:
        known = [name for name in dir(llm.recipes) if hasattr(getattr(llm.recipes, name), "pretrain_recipe")]
        close = nearest(base, known)
        raise ConfigError(
            f"NeMo has no pre-training recipe '{base}'.",
            key="base",
            value=base,
            hint=f"Did you mean '{close}'?" if close else None,
        ) from error
    return add_fp8(factory(), fp8_recipe)


@run.cli.factory
def delayed() -> run.Config[Fp8RecipeCallback]:
    """Delayed scaling with our defaults: a history of 1024, its maximum."""
    return callback("delayed")


@run.cli.factory
def tensorwise() -> run.Config[Fp8RecipeCallback]:
    """Current scaling, one scale a tensor."""
    return callback("tensorwise")


@run.cli.factory
def mxfp8() -> run.Config[Fp8RecipeCallback]:
    """MXFP8, E4M3 everywhere."""
    return callback("mxfp8")


@run.cli.factory
def blockwise() -> run.Config[Fp8RecipeCallback]:
    """1x128 blocks for activations and gradients, 128x128 for weights."""
    return callback("blockwise")


@run.cli.factory
def nvfp4() -> run.Config[Fp8RecipeCallback]:
    """NVFP4 with the Hadamard transform and stochastic rounding."""
    return callback("nvfp4")
