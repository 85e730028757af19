"""Megatron's configuration against the recipe."""

from __future__ import annotations

from enum import Enum
from types import SimpleNamespace

import pytest

from nemo_fp8_recipes import recipes
from nemo_fp8_recipes.errors import InjectionError
from nemo_fp8_recipes.injection import check_config, check_kind

QUANTISED = ["delayed", "tensorwise", "mxfp8", "blockwise", "nvfp4"]


def megatron_config(recipe: recipes.Recipe, **changes: object) -> SimpleNamespace:
    """A config set from a recipe, over Megatron's own defaults of these fields."""
    defaults = {
        "fp8": None,
        "fp8_recipe": "delayed",
        "fp4": None,
        "fp4_recipe": "nvfp4",
        "fp8_param": False,
        "fp4_param": False,
        "first_last_layers_bf16": False,
        "num_layers_at_start_in_bf16": 1,
        "num_layers_at_end_in_bf16": 1,
        "tp_only_amax_red": False,
        "recompute_granularity": None,
        "recompute_modules": ["core_attn"],
        "fine_grained_activation_offloading": False,
        "offload_modules": [],
    }
    return SimpleNamespace(**{**defaults, **recipe.megatron(), **changes})


@pytest.mark.parametrize("name", ["bf16", *QUANTISED])
def test_a_config_set_from_the_recipe_passes(name):
    recipe = recipes.load(name)
    check_config(recipe, megatron_config(recipe))


@pytest.mark.parametrize("asked", ["bf16", *QUANTISED])
@pytest.mark.parametrize("found", ["bf16", *QUANTISED])
def test_every_other_kind_is_refused(asked, found):
    config = megatron_config(recipes.load(found))
    if asked == found:
        check_kind(recipes.load(asked), config)
        return
    with pytest.raises(InjectionError, match=f"injected recipe '{asked}'") as raised:
        check_kind(recipes.load(asked), config)
    assert raised.value.key in {"fp8", "fp8_recipe", "fp4"}
    assert raised.value.allowed


def test_another_format_is_refused_by_name():
    with pytest.raises(InjectionError, match="fp8=hybrid") as raised:
        check_kind(recipes.load("mxfp8"), megatron_config(recipes.load("mxfp8", fp8_format="hybrid")))
    assert (raised.value.key, raised.value.value, raised.value.allowed) == ("fp8", "hybrid", ("e4m3",))


def test_megatrons_enum_is_its_value():
    kind = Enum("Fp8Recipe", {"mxfp8": "mxfp8"}, type=str)
    recipe = recipes.load("mxfp8")
    check_kind(recipe, megatron_config(recipe, fp8_recipe=kind.mxfp8))


@pytest.mark.parametrize(
    ("field", "value"),
    [("fp8_param", True), ("first_last_layers_bf16", True), ("tp_only_amax_red", True)],
)
def test_what_only_megatron_acts_on_must_agree(field, value):
    recipe = recipes.load("tensorwise")
    with pytest.raises(InjectionError, match=field) as raised:
        check_config(recipe, megatron_config(recipe, **{field: value}))
    assert raised.value.key == field


def test_the_number_of_bf16_layers_must_agree():
    recipe = recipes.load("tensorwise", num_layers_at_start_in_bf16=2, num_layers_at_end_in_bf16=1)
    check_config(recipe, megatron_config(recipe))
    with pytest.raises(InjectionError, match="num_layers_at_start_in_bf16=1"):
        check_config(recipe, megatron_config(recipe, num_layers_at_start_in_bf16=1))


def test_delayed_refuses_bf16_layers_and_says_why():
    recipe = recipes.load("delayed")
    with pytest.raises(InjectionError, match="one FP8 context spans all layers") as raised:
        check_config(recipe, megatron_config(recipe, first_last_layers_bf16=True))
    assert raised.value.key == "first_last_layers_bf16"


@pytest.mark.parametrize("module", ["layernorm", "moe_act"])
def test_delayed_refuses_recomputation_that_saves_unquantised_inputs(module):
    changes = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", module]}
    with pytest.raises(InjectionError, match="save_original_input") as raised:
        check_config(recipes.load("delayed"), megatron_config(recipes.load("delayed"), **changes))
    assert raised.value.key == "recompute_modules"
    assert module in str(raised.value)
    check_config(recipes.load("tensorwise"), megatron_config(recipes.load("tensorwise"), **changes))


def test_delayed_refuses_offloading_that_saves_unquantised_inputs():
    changes = {"fine_grained_activation_offloading": True, "offload_modules": ["expert_fc1"]}
    with pytest.raises(InjectionError, match="expert_fc1"):
        check_config(recipes.load("delayed"), megatron_config(recipes.load("delayed"), **changes))
