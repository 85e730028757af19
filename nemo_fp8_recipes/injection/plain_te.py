"""`autocast`: a recipe for plain Transformer Engine modules, without Megatron."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from nemo_fp8_recipes.errors import InjectionError
from nemo_fp8_recipes.targets.transformer_engine import CANNOT_BE_IMPORTED, first_line

if TYPE_CHECKING:
    from nemo_fp8_recipes.recipes import Recipe

__all__ = ["autocast"]


def autocast(recipe: Recipe, group: Any = None) -> AbstractContextManager[Any]:
    """Transformer Engine's `autocast` with this recipe; "bf16" gives one that quantises nothing.

    A module keeps its quantizers when only options change and not the kind of recipe: call
    `reset_quantization_state(module)` before it runs with other options.

    Args:
        recipe: the recipe.
        group: process group over which delayed scaling reduces amax; None is the default group.

    Raises:
        InjectionError: Transformer Engine cannot be imported.
    """
    try:
        import transformer_engine.pytorch as te
    except CANNOT_BE_IMPORTED as error:
        raise InjectionError(
            f"autocast() needs Transformer Engine, which cannot be imported: {first_line(error)}.",
            hint="Install Transformer Engine 2.0 or later; on a machine with no GPU call "
            "nemo_fp8_recipes.emulation.install() first.",
        ) from error
    enabled = recipe.precision != "bf16"
    te_object = recipe.te() if enabled else None
    context: AbstractContextManager[Any]
    if hasattr(te, "autocast"):
        context = te.autocast(enabled=enabled, recipe=te_object, amax_reduction_group=group)
    else:  # Transformer Engine before 2.9
        context = te.fp8_autocast(enabled=enabled, fp8_recipe=te_object, fp8_group=group)
    return context
