"""Checks on a built model, before its first step: can this recipe run in these modules?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_fp8_recipes.errors import InjectionError
from nemo_fp8_recipes.injection.module_names import named_modules
from nemo_fp8_recipes.injection.peers import derives_from

if TYPE_CHECKING:
    from torch import nn

    from nemo_fp8_recipes.recipes import Recipe

__all__ = ["check_model"]


def check_model(model: nn.Module | Sequence[nn.Module], recipe: Recipe) -> None:
    """Refuse a model in which the recipe cannot run.

    Raises:
        InjectionError: a quantised recipe and no Transformer Engine linear in the model (the local layer
            spec), or delayed scaling and a module with `save_original_input`.
    """
    if recipe.precision == "bf16":
        return
    linears = [
        named
        for named in named_modules(model)
        if derives_from(named.module, "transformer_engine", "TransformerEngineBaseModule")
        and not derives_from(named.module, "transformer_engine", "DotProductAttention")
    ]
    if not linears:
        raise InjectionError(
            f"fp8_recipe={recipe.name} was asked for, and the model has no Transformer Engine layer to "
            f"quantise: Megatron's local layer spec trains in high precision whatever its config says.",
            key="fp8_recipe",
            value=recipe.name,
            hint="Build the model with get_gpt_layer_with_transformer_engine_spec().",
        )
    if recipe.name == "delayed":
        _refuse_saved_inputs(
            [named.path for named in linears if getattr(named.module, "save_original_input", False)]
        )


def _refuse_saved_inputs(paths: list[str]) -> None:
    if not paths:
        return
    others = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    raise InjectionError(
        f"Delayed scaling cannot run in {paths[0]}{others}: Megatron set save_original_input there, which "
        f"keeps the unquantised input for the weight gradient. Megatron does so for every FP8 recipe but "
        f"delayed, so the model was built while its config named another recipe.",
        key="save_original_input",
        value=True,
        allowed=[False],
        hint="Build the model with fp8_recipe=delayed in its config.",
    )
