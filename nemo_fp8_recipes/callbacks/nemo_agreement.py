"""Do NeMo's precision plugin, the model's config and the recipe say the same?

`MegatronStrategy.connect` copies the plugin's fields onto the configs with setattr, after the configs' own
checks and over whatever the user had set there. So two moments are checked: before the copy, that nothing the
user said is overwritten in silence; after it, that what arrived is what the recipe needs, by the checks that
Megatron makes in its constructor and that setattr went round. Imports neither NeMo nor torch: the configs are
looked at by their attributes.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from enum import Enum
from typing import Any

from nemo_fp8_recipes.errors import InjectionError
from nemo_fp8_recipes.injection import check_config
from nemo_fp8_recipes.recipes import Recipe
from nemo_fp8_recipes.targets import nemo

__all__ = ["check_after_copy", "check_model_config", "check_plugin", "follow_copy", "set_plugin"]

_ABOUT_QUANTISATION = ("fp8", "fp4", "bf16", "delayed scaling")


def check_plugin(recipe: Recipe, dtype_config: Any) -> None:
    """Check what the plugin says, before NeMo copies it.

    Args:
        recipe: the recipe of the callback.
        dtype_config: `dtype_config` of the trainer's precision plugin; None when the plugin has none.

    Raises:
        InjectionError: the plugin does not train in BF16, or says FP8 otherwise than the recipe.
    """
    if dtype_config is None or not getattr(dtype_config, "bf16", False):
        raise InjectionError(
            "The trainer's precision plugin does not train in BF16, which every recipe needs for what it "
            "does not quantise.",
            key="precision",
            value=None if dtype_config is None else ("fp16" if dtype_config.fp16 else "fp32"),
            allowed=["bf16-mixed"],
            hint="Use plugins=precision_plugin(recipe), or MegatronMixedPrecision(precision='bf16-mixed').",
        )
    if _silent(dtype_config):
        return
    for field, wanted in nemo.dtype_fields(recipe).items():
        if _without_effect(field, recipe):
            continue
        found = _plain(getattr(dtype_config, field, wanted))
        if found != wanted:
            raise InjectionError(
                f"The precision plugin says {_argument(field)}={_show(found)} while the recipe "
                f"'{recipe.name}' of the callback says {_show(wanted)}.",
                key=_argument(field),
                value=found,
                allowed=[_show(wanted)],
                hint="Make the plugin from the recipe, plugins=precision_plugin(recipe), or leave FP8 out of "
                "the plugin: the callback sets it.",
            )


def set_plugin(recipe: Recipe, dtype_config: Any) -> None:
    """Make the plugin say the recipe. A plugin that has been checked loses nothing by it."""
    for field, value in nemo.dtype_fields(recipe).items():
        if hasattr(dtype_config, field):
            setattr(dtype_config, field, value)


def check_model_config(recipe: Recipe, config: Any, *, called: str = "model config") -> None:
    """Refuse FP8 settings of the user's own in a config that NeMo is about to overwrite.

    Raises:
        InjectionError: a field that belongs to the recipe was set, and not to the recipe's value.
    """
    defaults = _defaults(config)
    for field, wanted in nemo.dtype_fields(recipe).items():
        if not hasattr(config, field):
            continue
        found = _plain(getattr(config, field))
        if found == wanted or found == _plain(defaults.get(field)):
            continue
        raise InjectionError(
            f"The {called} says {field}={_show(found)} by itself; NeMo would overwrite it with what the "
            f"recipe '{recipe.name}' says, {field}={_show(wanted)}.",
            key=field,
            value=found,
            allowed=[_show(wanted)],
            hint=f"Leave {field} out of the {called}, or choose the recipe that says so.",
        )


def check_after_copy(recipe: Recipe, config: Any) -> None:
    """Check the model's config once NeMo has copied the plugin's fields onto it.

    Raises:
        InjectionError: it does not say the recipe, or combines it with what Megatron refuses in its
            constructor.
    """
    check_config(recipe, config)
    layers = getattr(config, "num_layers", None)
    ends = getattr(recipe, "layers_in_bf16", 0)
    if layers is not None and ends >= layers > 0:
        raise InjectionError(
            f"The recipe keeps {ends} layers in BF16 and the model has {layers}: none is left to quantise.",
            key="num_layers_at_start_in_bf16",
            value=ends,
            allowed=[f"< {layers} layers, start and end together"],
        )
    complaint = _megatrons_complaint(config)
    if complaint is not None:
        raise InjectionError(
            f"Megatron refuses the model's config with what the recipe '{recipe.name}' sets: "
            f"{complaint.rstrip('.')}.",
            key="fp8_recipe",
            value=recipe.name,
        )


def follow_copy(optimizer_config: Any) -> None:
    """Let the optimizer's config draw its conclusions again, from the recipe that NeMo set meanwhile.

    Megatron's `OptimizerConfig.__post_init__` decides there how the precision-aware optimizer treats
    gradients, by the FP8 recipe that it knew then: none.
    """
    derive = getattr(optimizer_config, "__post_init__", None)
    if derive is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said once already, when the config was made
            derive()


def _megatrons_complaint(config: Any) -> str | None:
    """What the config's own constructor says of its present values, as far as it concerns quantisation."""
    check = getattr(type(config), "__post_init__", None)
    if check is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(copy.copy(config))
    except (ValueError, AssertionError) as error:
        text = str(error)
        return text if any(word in text.lower() for word in _ABOUT_QUANTISATION) else None
    return None


def _silent(dtype_config: Any) -> bool:
    """Whether the plugin says nothing of FP8: neither on, nor anything beside NeMo's own defaults."""
    return getattr(dtype_config, "fp8", None) is None and getattr(dtype_config, "fp4", None) is None


def _without_effect(field: str, recipe: Recipe) -> bool:
    """Fields that mean nothing under this recipe, whatever a plugin says there."""
    if field == "fp4_recipe":
        return recipe.precision != "fp4"
    if field == "fp8_recipe":
        return recipe.precision != "fp8"
    return field in ("fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo", "fp8_wgrad") and (
        recipe.name != "delayed"
    )


def _defaults(config: Any) -> dict[str, Any]:
    """What each field of a config class is when nobody sets it."""
    if not dataclasses.is_dataclass(config):
        return {}
    return {field.name: field.default for field in dataclasses.fields(config)}


def _argument(field: str) -> str:
    """What `MegatronMixedPrecision` calls a field of its DtypeConfig."""
    return "fp8_param_gather" if field == "fp8_param" else field


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def _show(value: Any) -> str:
    return "None" if value is None else str(value)
