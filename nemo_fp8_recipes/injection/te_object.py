"""The Transformer Engine recipe object that is handed to Megatron."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemo_fp8_recipes.errors import InjectionError

if TYPE_CHECKING:
    from nemo_fp8_recipes.recipes import Recipe

__all__ = ["megatron_te_object"]


def megatron_te_object(recipe: Recipe) -> Any:
    """The object that Megatron's `get_fp8_recipe` (or `get_fp4_recipe`) will return for a recipe.

    It is `recipe.te()`, with two things that only delayed scaling needs: the class is Megatron's own
    `TEDelayedScaling`, so that Megatron's isinstance checks hold, and `fp8_wgrad=False` becomes the
    `override_linear_precision` that Megatron's class passes.

    Raises:
        InjectionError: the recipe asks for high-precision weight gradients and this Transformer Engine
            cannot do that. Megatron's own `TEDelayedScaling` still passes `override_linear_precision`, and
            the dataclass silently drops keywords it does not know.
    """
    te_object = recipe.te()
    if recipe.name != "delayed":
        return te_object

    from megatron.core.extensions.transformer_engine import TEDelayedScaling

    delayed = object.__new__(TEDelayedScaling)
    for name, value in vars(te_object).items():
        if name != "_cached_repr":  # names the other class
            setattr(delayed, name, value)
    if not recipe.fp8_wgrad:  # type: ignore[attr-defined]  # a field of Delayed
        if "override_linear_precision" not in type(te_object).__dataclass_fields__:
            raise InjectionError(
                "Delayed scaling with high-precision weight gradients is not possible with this Transformer "
                "Engine: its DelayedScaling no longer has override_linear_precision, and Megatron's "
                "fp8_wgrad=False would be dropped without a word.",
                key="fp8_recipe.fp8_wgrad",
                value=False,
                allowed=[True],
                hint="Keep fp8_wgrad=true, or use a recipe with backward_override=high_precision.",
            )
        # (fprop, dgrad, wgrad): the one override that Transformer Engine ever supported.
        delayed.override_linear_precision = (False, False, True)
    return delayed
