"""The Transformer Engine recipe object that is handed to Megatron."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_fp8_recipes.recipes import Recipe

__all__ = ["megatron_te_object"]


def megatron_te_object(recipe: Recipe) -> Any:
    """The object that Megatron's `get_fp8_recipe` (or `get_fp4_recipe`) will return for a recipe.

    It is `recipe.te()`; for delayed scaling it is given Megatron's own class `TEDelayedScaling`, so that
    its isinstance checks hold. That class's constructor cannot be used: it reads a TransformerConfig, which
    lacks most of the options.
    """
    te_object = recipe.te()
    if recipe.name != "delayed":
        return te_object

    from megatron.core.extensions.transformer_engine import TEDelayedScaling

    delayed = object.__new__(TEDelayedScaling)
    for name, value in vars(te_object).items():
        if name != "_cached_repr":  # names the other class
            setattr(delayed, name, value)
    return delayed
