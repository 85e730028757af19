"""A recipe as NeMo 2 wants it: the fields of `MegatronMixedPrecision`, and the plugin itself.

NeMo's precision plugin is where its users say FP8; `MegatronStrategy.connect` copies the plugin's fields onto
the model's, the optimizer's and the data-parallel config. Its defaults (delayed, a history of 1, most_recent)
are never relied on: every field is given. Written against nemo_toolkit 2.7.3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemo_fp8_recipes.recipes import Recipe, load

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nemo.lightning.pytorch.plugins import MegatronMixedPrecision

__all__ = ["COPIED_FIELDS", "dtype_fields", "plugin_arguments", "precision_plugin"]

COPIED_FIELDS = (
    "fp8",
    "fp8_recipe",
    "fp4",
    "fp4_recipe",
    "first_last_layers_bf16",
    "num_layers_at_start_in_bf16",
    "num_layers_at_end_in_bf16",
    "fp8_margin",
    "fp8_amax_history_len",
    "fp8_amax_compute_algo",
    "fp8_wgrad",
    "fp8_dot_product_attention",
    "fp8_multi_head_attention",
    "fp8_param",
)
"""The fields of NeMo's `DtypeConfig` that belong to the recipe and that Megatron's config has too."""


def dtype_fields(recipe: Recipe) -> dict[str, Any]:
    """Every field of NeMo's `DtypeConfig` that belongs to the recipe, with the value that says this recipe.

    What the recipe does not mention gets the value that means nothing: no name of a kind that is off, no
    layer in BF16.
    """
    given = recipe.megatron()
    neutral: dict[str, Any] = {
        "fp8": None,
        "fp8_recipe": None,
        "fp4": None,
        "fp4_recipe": "nvfp4",
        "first_last_layers_bf16": False,
        "num_layers_at_start_in_bf16": 0,
        "num_layers_at_end_in_bf16": 0,
        "fp8_margin": 0,
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
        "fp8_wgrad": True,
        "fp8_dot_product_attention": False,
        "fp8_multi_head_attention": False,
        "fp8_param": False,
    }
    fields = {field: given.get(field, meaning) for field, meaning in neutral.items()}
    return {**fields, "fp8_param_gather": fields["fp8_param"]}


def plugin_arguments(recipe: Recipe) -> dict[str, Any]:
    """Arguments of `MegatronMixedPrecision` for training in BF16 with this recipe; dtypes left out."""
    fields = dtype_fields(recipe)
    del fields["fp8_param"]  # the plugin makes it from fp8_param_gather
    return {"precision": "bf16-mixed", "autocast_enabled": False, "grad_reduce_in_fp32": True, **fields}


def precision_plugin(recipe: str | Recipe | Mapping[str, Any], /, **arguments: Any) -> MegatronMixedPrecision:
    """NeMo's `MegatronMixedPrecision` for this recipe, for `nl.Trainer(plugins=…)`.

    The plugin carries what NeMo can express. The other options of the recipe reach Transformer Engine through
    `callbacks.nemo.Fp8RecipeCallback`, which also checks that the two say the same.

    Args:
        recipe: a recipe, its name, or a mapping as `recipes.load` takes it.
        arguments: further arguments of `MegatronMixedPrecision`, such as `grad_reduce_in_fp32=False`.

    Raises:
        RecipeError: there is no such recipe.
    """
    import torch
    from nemo.lightning.pytorch.plugins import MegatronMixedPrecision

    dtypes = {"params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
    return MegatronMixedPrecision(**{**plugin_arguments(load(recipe)), **dtypes, **arguments})
