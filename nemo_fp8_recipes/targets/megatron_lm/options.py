"""What carries each option of a recipe into Megatron-LM's `pretrain_gpt.py`.

Megatron-LM builds Transformer Engine's recipe object itself, from flags that know the format and little else.
What is left over reaches TE through its environment variables, through a quantizer factory of ours (TE's
CustomRecipe), or only through injection, which two lines in the training script switch on
(`callbacks.megatron_lm`).

Flags: megatron/training/arguments.py and megatron/core/transformer/transformer_config.py, from which
Megatron-LM generates most of them. There is none for fp8_dot_product_attention, fp8_multi_head_attention and
tp_only_amax_red.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from nemo_fp8_recipes.recipes.base import Recipe
from nemo_fp8_recipes.recipes.delayed import is_dotted_path
from nemo_fp8_recipes.targets import te_environment

__all__ = ["FLAGS", "Carrier", "carrier", "changed"]

Carrier = Literal["flag", "variable", "factory", "injection", "nothing", "fixed"]
"""`fixed`: the recipe itself takes the default only. `nothing`: Megatron-LM cannot be told."""

FLAGS: Mapping[str, str] = MappingProxyType(
    {
        "fp8": "--fp8-format",
        "fp8_recipe": "--fp8-recipe",
        "fp8_margin": "--fp8-margin",
        "fp8_amax_history_len": "--fp8-amax-history-len",
        "fp8_amax_compute_algo": "--fp8-amax-compute-algo",
        "fp8_param": "--fp8-param-gather",
        "fp4": "--fp4-format",
        "fp4_recipe": "--fp4-recipe",
        "fp4_param": "--fp4-param-gather",
        "first_last_layers_bf16": "--first-last-layers-bf16",
        "num_layers_at_start_in_bf16": "--num-layers-at-start-in-bf16",
        "num_layers_at_end_in_bf16": "--num-layers-at-end-in-bf16",
    }
)
"""Field of Megatron-Core's TransformerConfig -> flag of Megatron-LM."""

_IN_QUANTIZERS = {
    "tensorwise": ("amax_epsilon", "fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad"),
    "blockwise": (
        "amax_epsilon",
        "fp8_quant_fwd_inp",
        "fp8_quant_fwd_weight",
        "fp8_quant_bwd_grad",
        "x_block_scaling_dim",
        "w_block_scaling_dim",
        "grad_block_scaling_dim",
    ),
    "mxfp8": ("enable_2d_quantization",),
}
"""Options that are properties of quantizers, which a factory makes."""


def carrier(recipe: Recipe, option: str) -> Carrier:
    """What carries this option of this recipe, with the value that it has."""
    field = next(field for field in dataclasses.fields(recipe) if field.name == option)
    value = getattr(recipe, option)
    if field.metadata["ignored"]:
        return "fixed"
    if option == "fp8_format":
        return "fixed" if recipe.precision == "fp4" else "flag"
    if option == "fp4_format":
        return "flag"
    if option == "tp_only_amax_red":
        return "nothing"
    if field.metadata["megatron"] in FLAGS:
        return "injection" if isinstance(value, str) and is_dotted_path(value) else "flag"
    if any(
        variable.option == option and recipe.name in variable.recipes
        for variable in te_environment.VARIABLES.values()
    ):
        return "variable"
    if option in _IN_QUANTIZERS.get(recipe.name, ()):
        return "factory"
    return "injection"


def changed(recipe: Recipe) -> dict[str, Any]:
    """The options that differ from their default."""
    return {
        field.name: getattr(recipe, field.name)
        for field in dataclasses.fields(recipe)
        if getattr(recipe, field.name) != field.default
    }
