"""Does Megatron's configuration say what the recipe says?

Injection replaces the recipe *object*. Its kind stays Megatron's business: the optimizer, MoE padding, the
placement of the FP8 context and `save_original_input` all read the configuration. So both must name the same
kind, and for the options that only Megatron acts on the configuration must carry the recipe's values.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

from nemo_fp8_recipes.errors import InjectionError

if TYPE_CHECKING:
    from nemo_fp8_recipes.recipes import Recipe

__all__ = ["check_config", "check_kind"]

_KIND_FIELDS = ("fp8", "fp8_recipe", "fp4", "fp4_recipe")

_ACTED_ON_BY_MEGATRON = {
    "fp8_param": False,
    "fp4_param": False,
    "first_last_layers_bf16": False,
    "num_layers_at_start_in_bf16": None,
    "num_layers_at_end_in_bf16": None,
    "tp_only_amax_red": False,
}
"""Fields that no recipe object carries, with the value a recipe that does not mention them means; None:
any.
"""


def check_kind(recipe: Recipe, config: Any) -> None:
    """Check that a Megatron config names the same kind and format of recipe.

    Args:
        recipe: the recipe to inject.
        config: a TransformerConfig, or anything with its fp8, fp8_recipe, fp4 and fp4_recipe.

    Raises:
        InjectionError: they differ; names the field, its value and what is expected.
    """
    compare_kind(recipe.megatron(), config, recipe.name)


def compare_kind(expected: Mapping[str, Any], config: Any, name: str) -> None:
    """`check_kind` on the fields of a recipe that were computed before; called for every layer of every
    step.
    """
    for field in _KIND_FIELDS:
        if field.endswith("_recipe") and expected.get(field.removesuffix("_recipe")) is None:
            continue  # the kind of a precision that is off says nothing
        found, wanted = _plain(getattr(config, field, None)), _plain(expected.get(field))
        if found != wanted:
            raise InjectionError(
                f"Megatron's config says {field}={_show(found)} while the injected recipe '{name}' needs "
                f"{field}={_show(wanted)}.",
                key=field,
                value=found,
                allowed=[_show(wanted)],
                hint="Set the config from recipe.megatron() before the model is built.",
            )


def check_config(recipe: Recipe, config: Any) -> None:
    """Check everything in a Megatron config that decides whether the recipe arrives, before a model is built.

    Raises:
        InjectionError: another kind or format, another placement or storage than the recipe's, or a
            combination that breaks inside Transformer Engine.
    """
    check_kind(recipe, config)
    if recipe.precision == "bf16":
        return
    if recipe.name == "delayed":
        _check_delayed(config)
    fields = recipe.megatron()
    for field, meant in _ACTED_ON_BY_MEGATRON.items():
        wanted = fields.get(field, meant)
        found = getattr(config, field, None)
        if wanted is None or found is None or found == wanted:
            continue
        if field.startswith("num_layers_at") and not fields.get("first_last_layers_bf16"):
            continue
        raise InjectionError(
            f"Megatron's config says {field}={found} while the recipe '{recipe.name}' says {field}={wanted}; "
            "Megatron acts on its own value.",
            key=field,
            value=found,
            allowed=[wanted],
            hint="Set the config from recipe.megatron(), or the recipe's own option of that name.",
        )


def _check_delayed(config: Any) -> None:
    """Refuse what breaks delayed scaling.

    Megatron checks some of this in its config's constructor, but NeMo and Bridge set FP8 fields later.
    """
    if getattr(config, "first_last_layers_bf16", False):
        raise InjectionError(
            "Delayed scaling cannot keep first or last layers in BF16: one FP8 context spans all layers, "
            "because amax histories are reduced and scales updated when it is left.",
            key="first_last_layers_bf16",
            value=True,
            allowed=[False],
            hint="Use fp8_recipe=tensorwise for BF16 layers at the ends, or quantise every layer.",
        )
    saved = _saves_original_input(config)
    if saved is not None:
        field, value = saved
        raise InjectionError(
            f"Delayed scaling cannot run with {field} containing '{value}': Megatron then keeps the "
            f"unquantised input for the weight gradient (save_original_input), and requantising it would "
            f"disturb the amax history.",
            key=field,
            value=list(getattr(config, field)),
            hint=f"Remove '{value}', or use another recipe.",
        )


def _saves_original_input(config: Any) -> tuple[str, str] | None:
    """The config field and entry for which Megatron sets `save_original_input` whatever the FP8 recipe is.

    `transformer_layer.py`, `moe/experts.py`, `moe/moe_layer.py`; attention, MLA and shared experts leave
    delayed scaling out by themselves.
    """
    if getattr(config, "recompute_granularity", None) == "selective":
        for module in ("layernorm", "moe_act"):
            if module in (getattr(config, "recompute_modules", None) or ()):
                return "recompute_modules", module
    if getattr(config, "fine_grained_activation_offloading", False) and "expert_fc1" in (
        getattr(config, "offload_modules", None) or ()
    ):
        return "offload_modules", "expert_fc1"
    return None


def _plain(value: Any) -> Any:
    """Megatron accepts its enums and their values alike."""
    return value.value if isinstance(value, Enum) else value


def _show(value: Any) -> str:
    return "null" if value is None else str(value)
