"""How the recipe gets into Megatron: by its config alone where that says everything, by injection elsewhere.

For each recipe the way that changes least is taken. Bridge copies the recipe's fields to Megatron's config.
Where Megatron makes of them the very object that we would inject, nothing is replaced ("config"); where an
option would be lost, its `get_fp8_recipe` is answered by our object ("get_fp8_recipe"). Which one it was is
in the manifest.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from nemo_fp8_recipes.callbacks.megatron_core import Fp8Run
from nemo_fp8_recipes.errors import InjectionError
from nemo_fp8_recipes.injection.context import require_no_injection
from nemo_fp8_recipes.injection.extra_state import loadable_extra_state
from nemo_fp8_recipes.injection.te_object import megatron_te_object
from nemo_fp8_recipes.recipes import Recipe

__all__ = ["BridgeRun", "Way", "choose"]

Way = Literal["config", "get_fp8_recipe"]


class BridgeRun(Fp8Run):
    """`Fp8Run` that injects only where Megatron's config does not say everything.

    Attributes:
        way: how the recipe gets in.
    """

    def __init__(self, recipe: Recipe, way: Way) -> None:
        super().__init__(recipe, injecting=way == "get_fp8_recipe")
        self.way: Way = way

    def __enter__(self) -> BridgeRun:
        super().__enter__()
        if self.recipe.precision != "bf16":
            # Bridge loads checkpoints itself, amax histories and scales included.
            self._exit.enter_context(loadable_extra_state())
        return self


def choose(recipe: Recipe, config: Any) -> Way:
    """The way for `recipe` and a model config that carries its fields.

    Raises:
        InjectionError: Megatron-Core runs without Transformer Engine, or another recipe is injected.
    """
    from megatron.core import fp8_utils

    if recipe.precision == "bf16":
        return "config"
    if not fp8_utils.HAVE_TE:
        raise InjectionError(
            "Megatron-Core runs without Transformer Engine here: it would accept any FP8 setting and train "
            "in high precision without a word.",
            hint="Install Transformer Engine, or on a machine with no GPU start with device=emulated.",
        )
    require_no_injection(recipe)  # or what Megatron makes would be what somebody else injects
    theirs = _made_by_megatron(recipe, config)
    return "config" if _same(theirs, megatron_te_object(recipe)) else "get_fp8_recipe"


def _made_by_megatron(recipe: Recipe, config: Any) -> Any:
    if recipe.precision == "fp4":
        from megatron.core.fp4_utils import get_fp4_recipe

        return get_fp4_recipe(config)
    from megatron.core.fp8_utils import get_fp8_recipe

    return get_fp8_recipe(config)


def _same(theirs: Any, ours: Any) -> bool:
    """Whether two recipe objects decide everything alike: class, fields, and what TE keeps as class
    attributes.
    """
    if type(theirs) is not type(ours):
        return False
    names = {field.name for field in dataclasses.fields(ours)}
    names |= {name for kind in type(ours).__mro__ for name in vars(kind) if name.startswith(("fp8_", "fp4_"))}
    names |= {name for name in vars(ours) if not name.startswith("_")}
    return all(getattr(theirs, name, None) == getattr(ours, name, None) for name in names)
