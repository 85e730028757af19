"""Which recipes this job can keep its weights in (`fp8_recipe.fp8_param`). Imports no torch."""

from __future__ import annotations

from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.recipes import Recipe

__all__ = ["PRIMARY_WEIGHTS", "check_primary_weights"]

PRIMARY_WEIGHTS = ("delayed", "tensorwise", "blockwise")


def check_primary_weights(recipe: Recipe) -> None:
    """Raise `ConfigError` for quantised primary weights that this job cannot keep up to date.

    Megatron's distributed optimizer updates MXFP8 weights only with `reuse_grad_buf_for_mxfp8_param_ag` and a
    copy that the training loop has to make in every step (`_copy_main_params_to_param_buffer`); without it
    the model does not learn and nothing complains (`megatron/core/optimizer/distrib_optimizer.py`).
    """
    if getattr(recipe, "fp8_param", False) and recipe.name not in PRIMARY_WEIGHTS:
        raise ConfigError(
            f"fp8_recipe.fp8_param=true with {recipe.name}: `nemo-fp8 train` cannot keep its weights in "
            f"{recipe.name}, because Megatron updates such weights only through its gradient buffers.",
            key="fp8_recipe.fp8_param",
            value=True,
            hint=f"Set fp8_recipe.fp8_param=false; {', '.join(PRIMARY_WEIGHTS)} can keep them quantised.",
        )
