"""The manifest against the recipe: every disagreement is found and named."""

from __future__ import annotations

import dataclasses

import pytest

from nemo_fp8_recipes import recipes
from nemo_fp8_recipes.errors import InjectionError
from nemo_fp8_recipes.injection import Manifest, complaints, require_quantized

from .examples import MXFP8, gpt_manifest, high_precision_row, mxfp8_row

RECIPE = recipes.load("mxfp8")
FC1 = "decoder.layers.0.mlp.linear_fc1"


def said(manifest: Manifest, recipe: recipes.Recipe = RECIPE) -> list[str]:
    return [str(complaint) for complaint in complaints(manifest, recipe)]


def test_agreement_is_silent():
    assert said(gpt_manifest(2)) == []
    require_quantized(gpt_manifest(2), RECIPE)


@pytest.mark.parametrize("operand", ["input", "weight", "grad_output"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "e5m2"}, "has format=e5m2, the recipe says e4m3"),
        ({"scaling": "tensorwise"}, "has scaling=tensorwise, the recipe says block"),
        ({"block": (1, 128)}, "has block=(1, 128), the recipe says (1, 32)"),
        ({"scale_dtype": "fp32"}, "has scale_dtype=fp32, the recipe says e8m0"),
        ({"power_of_two": False}, "has power_of_two=False, the recipe says True"),
    ],
)
def test_each_property_of_each_operand_is_compared(operand, change, says):
    row = mxfp8_row(FC1, **{operand: dataclasses.replace(MXFP8, **change)})
    assert said(Manifest((row,))) == [f"{FC1} {operand} {says}"]


def test_swapped_operands_of_hybrid_are_found():
    """E5M2 for the input and E4M3 for the gradient: losses would hardly show it."""
    recipe = recipes.load("mxfp8", fp8_format="hybrid")
    row = mxfp8_row(FC1, input=dataclasses.replace(MXFP8, format="e5m2"))
    assert said(Manifest((row,)), recipe) == [
        f"{FC1} input has format=e5m2, the recipe says e4m3",
        f"{FC1} grad_output has format=e4m3, the recipe says e5m2",
    ]


@pytest.mark.parametrize("code", ["not_transformer_engine", "no_forward", "outside_context", "bf16_layer"])
def test_unexpected_high_precision_is_found(code):
    manifest = Manifest((mxfp8_row("other"), high_precision_row(FC1, code)))
    assert said(manifest) == [f"{FC1} is in high precision: for a reason"]


@pytest.mark.parametrize("code", ["output_layer", "router", "attention", "per_module_override"])
def test_expected_high_precision_is_accepted(code):
    assert said(Manifest((mxfp8_row("other"), high_precision_row(FC1, code)))) == []


def test_bf16_layers_are_accepted_from_a_recipe_that_asks_for_them():
    manifest = Manifest((mxfp8_row("other"), high_precision_row(FC1, "bf16_layer")))
    assert said(manifest, recipes.load("mxfp8", num_layers_at_start_in_bf16=1)) == []


def test_amax_epsilon_and_history_length_are_compared():
    tensorwise = recipes.load("tensorwise", amax_epsilon=0.5, fp8_format="e4m3")
    operand = dataclasses.replace(
        MXFP8, scaling="tensorwise", block=None, scale_dtype="fp32", power_of_two=False
    )
    row = mxfp8_row(FC1, recipe="tensorwise", input=operand, weight=operand, grad_output=operand)
    assert f"{FC1} weight has amax_epsilon=0.0, the recipe says 0.5" in said(Manifest((row,)), tensorwise)

    delayed = recipes.load("delayed", amax_history_len=16, fp8_format="e4m3")
    operand = dataclasses.replace(operand, scaling="delayed", amax_history_len=1)
    row = mxfp8_row(FC1, recipe="delayed", input=operand, weight=operand, grad_output=operand)
    assert f"{FC1} input has amax_history_len=1, the recipe says 16" in said(Manifest((row,)), delayed)


def test_a_quantised_gradient_contradicts_backward_override():
    recipe = recipes.load("mxfp8", backward_override="high_precision")
    assert said(Manifest((mxfp8_row(FC1),)), recipe) == [
        f"{FC1} grad_output is quantised, the recipe leaves it in high precision"
    ]


def test_a_module_may_have_the_recipe_that_megatrons_config_gives_it_and_no_other():
    found = Manifest((mxfp8_row("other"), mxfp8_row(FC1, recipe="blockwise")))
    require_quantized(found, RECIPE, megatrons={FC1: "blockwise"})
    require_quantized(found, RECIPE, megatrons={FC1: "custom"})
    for megatrons in ({FC1: "tensorwise"}, {"other": "blockwise"}, {FC1: "bf16"}):
        with pytest.raises(InjectionError, match=f"{FC1} is quantised by blockwise"):
            require_quantized(found, RECIPE, megatrons=megatrons)


def test_bf16_accepts_nothing_quantised():
    bf16 = recipes.load("bf16")
    require_quantized(Manifest((high_precision_row(FC1, "outside_context"),)), bf16)
    with pytest.raises(InjectionError, match="is quantised by mxfp8"):
        require_quantized(Manifest((mxfp8_row(FC1),)), bf16)


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        ("outside_context", "recipe.megatron"),
        ("no_forward", "training step"),
        ("not_transformer_engine", "get_gpt_layer_with_transformer_engine_spec"),
    ],
)
def test_nothing_quantised_is_an_error_that_says_what_to_do(code, advice):
    rows = (high_precision_row(FC1, code), high_precision_row("output_layer", "output_layer"))
    with pytest.raises(InjectionError, match="no module is quantised") as raised:
        require_quantized(Manifest(rows), RECIPE)
    assert advice in str(raised.value)
    assert raised.value.key == "fp8_recipe"


def test_a_model_without_linear_layers_is_an_error():
    with pytest.raises(InjectionError, match="no linear layer"):
        require_quantized(Manifest(()), RECIPE)


def test_the_error_says_equal_complaints_once():
    wrong = dataclasses.replace(MXFP8, format="e5m2")
    rows = tuple(mxfp8_row(f"decoder.layers.{n}.mlp.linear_fc1", input=wrong) for n in range(12))
    with pytest.raises(InjectionError) as raised:
        require_quantized(Manifest(rows), RECIPE)
    assert str(raised.value).count("has format=e5m2") == 1
    assert "decoder.layers.0.mlp.linear_fc1" in str(raised.value)
    assert "(and 11 more)" in str(raised.value)
