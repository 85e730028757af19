"""Quantizer factories for Transformer Engine's CustomRecipe, one for every recipe that can come from one.

A factory makes the quantizer that the recipe's own TE object would have given: TE's recipe state of that
object is asked for it, so nothing of TE's rules is repeated here. The recipe's options come from the
environment variable NEMO_FP8_RECIPE, as Megatron-LM hands a factory nothing but its name.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import TYPE_CHECKING, Any

from nemo_fp8_recipes.errors import RecipeError
from nemo_fp8_recipes.targets.megatron_lm import variable

if TYPE_CHECKING:
    from nemo_fp8_recipes.recipes import Recipe

__all__ = ["blockwise", "delayed", "mxfp8", "nvfp4", "tensorwise"]

_FORWARD = ("input", "weight", "output")
_BACKWARD = ("grad_output", "grad_input")
_QPARAMS = {
    "input": "fp8_quant_fwd_inp",
    "output": "fp8_quant_fwd_inp",
    "weight": "fp8_quant_fwd_weight",
    "grad_output": "fp8_quant_bwd_grad",
    "grad_input": "fp8_quant_bwd_grad",
}


def tensorwise(role: Any) -> Any:
    """`Float8CurrentScalingQuantizer` with `fp8_recipe=tensorwise`'s options.

    Here and below `role` is a `QuantizerRole`, before Transformer Engine 2.16 a word.
    """
    return _quantizer("tensorwise", role)


def blockwise(role: Any) -> Any:
    """`Float8BlockQuantizer` for a `QuantizerRole`, with `fp8_recipe=blockwise`'s options."""
    return _quantizer("blockwise", role)


def mxfp8(role: Any) -> Any:
    """`MXFP8Quantizer` for a `QuantizerRole`, with `fp8_recipe=mxfp8`'s options.

    Raises:
        RecipeError: for a grouped linear layer: Megatron pads an expert's tokens to 16 for the kind
            `custom`, and MXFP8 needs 32.
    """
    if getattr(role, "module_type", "") == "grouped_linear":
        raise RecipeError(
            "MXFP8 from a quantizer factory cannot quantise a grouped linear layer: Megatron pads an "
            "expert's tokens to 16 for the kind `custom`, and MXFP8 needs 32.",
            key="fp8_recipe",
            value="mxfp8",
            hint="Use --fp8-recipe mxfp8, or the hook of docs/megatron_lm.md for options without a flag.",
        )
    return _quantizer("mxfp8", role)


def nvfp4(role: Any) -> Any:
    """`NVFP4Quantizer` for a `QuantizerRole`, with `fp8_recipe=nvfp4`'s options."""
    return _quantizer("nvfp4", role)


def delayed(_role: Any) -> Any:
    """Refused: delayed scaling cannot come from a factory in Megatron.

    Raises:
        RecipeError: always.
    """
    raise RecipeError(
        "Delayed scaling cannot come from a quantizer factory: Megatron enters a `custom` recipe once for "
        "every layer, and TE would update all amax histories each time one is left.",
        key="fp8_recipe",
        value="delayed",
        hint="Use --fp8-recipe delayed with --fp8-margin, --fp8-amax-history-len and "
        "--fp8-amax-compute-algo, as `nemo-fp8 args fp8_recipe=delayed` writes them.",
    )


def _quantizer(name: str, role: Any) -> Any:
    text = os.environ.get(variable.RECIPE_VARIABLE, "")
    recipe, te_object = _recipe(name, text)
    tensor = _tensor(role)
    slots, mode = (_BACKWARD, "backward") if tensor in _BACKWARD else (_FORWARD, "forward")
    quantizer = _state(te_object, mode, role, slots).make_quantizers()[slots.index(tensor)]
    if recipe.name in ("tensorwise", "blockwise"):
        # TE's modules set these for its own recipes, and leave a factory's quantizers alone.
        params = getattr(te_object, _QPARAMS[tensor])
        quantizer.force_pow_2_scales = params.power_2_scale
        quantizer.amax_epsilon = params.amax_epsilon
    return quantizer


def _tensor(role: Any) -> str:
    """The tensor of a role; what has no role, or one that is not a linear layer's, counts as an output.

    TE's own factories treat such slots as forward ones too.
    """
    # Before 2.16 a role is a word, "linear_input".
    tensor = role.removeprefix("linear_") if isinstance(role, str) else getattr(role, "tensor_type", "")
    return tensor if tensor in (*_FORWARD, *_BACKWARD) else "output"


def _state(te_object: Any, mode: str, role: Any, slots: tuple[str, ...]) -> Any:
    from transformer_engine.pytorch import quantization

    made: dict[str, Any] = {"mode": mode, "num_quantizers": len(slots)}
    role_class = getattr(quantization, "QuantizerRole", None)
    if role_class is not None:
        module = role if role is not None else role_class()
        made["roles"] = [dataclasses.replace(module, tensor_type=slot) for slot in slots]
    return quantization.RecipeState.create(te_object, **made)


@functools.lru_cache(maxsize=8)
def _recipe(name: str, text: str) -> tuple[Recipe, Any]:
    """The recipe that the environment names, and its TE object.

    Raises:
        RecipeError: none is named, another one than this factory's, or one with an option that is no
            quantizer's.
    """
    from nemo_fp8_recipes.targets.megatron_lm.settings import settings

    recipe = variable.read({variable.RECIPE_VARIABLE: text})
    if recipe.name != name:
        raise RecipeError(
            f"The quantizer factory is {name}'s and {variable.RECIPE_VARIABLE} names {recipe.name}.",
            key=variable.RECIPE_VARIABLE,
            value=recipe.name,
            allowed=[name],
            hint="Take flags and environment over from one and the same `nemo-fp8 args`.",
        )
    settings(recipe, route="factory")
    return recipe, recipe.te()
