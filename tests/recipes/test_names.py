"""Other tools' names, and names that are none."""

import pytest

from nemo_fp8_recipes import recipes
from nemo_fp8_recipes.errors import RecipeError

# Each tool's own vocabulary, recipe by recipe.
VOCABULARIES = {
    "bf16": ["bf16", "bf16_mixed"],
    "delayed": [
        "delayed",
        "ds",
        "bf16_with_fp8_mixed",
        "bf16_with_fp8_delayed_scaling_mixed",
        "DelayedScaling",
        "fp8_delayed_scaling",
    ],
    "tensorwise": [
        "tensorwise",
        "cs",
        "fp8_cs",
        "bf16_with_fp8_current_scaling_mixed",
        "Float8CurrentScaling",
        "fp8_current_scaling",
        "current",
    ],
    "blockwise": [
        "blockwise",
        "ss",
        "fp8_sc",
        "bf16_with_fp8_subchannel_scaling_mixed",
        "Float8BlockScaling",
        "fp8_block_scaling",
        "block",
        "nanov2_bf16_with_fp8_current_scaling_mixed",
    ],
    "mxfp8": ["mxfp8", "fp8_mx", "bf16_with_mxfp8_mixed", "MXFP8BlockScaling", "mxfp8_rceil"],
    "nvfp4": [
        "nvfp4",
        "NVFP4BlockScaling",
        "bf16_with_nvfp4_mixed",
        "nemotron-3-super-bf16-with-nvfp4-mixed",
    ],
}


@pytest.mark.parametrize(
    ("canonical", "name"), [(canonical, name) for canonical, names in VOCABULARIES.items() for name in names]
)
def test_every_vocabulary_resolves(canonical, name):
    assert recipes.resolve(name).canonical == canonical
    assert recipes.load(name).name == canonical
    assert recipes.load(name.upper()).name == canonical


def test_a_canonical_name_needs_no_comment():
    assert recipes.resolve("MXFP8").sentence() == ""


def test_a_misleading_name_is_told():
    sentence = recipes.resolve("nanov2_bf16_with_fp8_current_scaling_mixed").sentence()
    assert "nemotron_nano_v2 is blockwise with fp8_format=hybrid" in sentence
    assert "says current scaling" in sentence


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mxpf8", "'mxfp8'"),
        ("delayd", "'delayed'"),
        ("tensor_wise", "'tensorwise'"),
        ("blokwise", "'blockwise'"),
    ],
)
def test_the_nearest_spelling_is_offered(name, hint):
    with pytest.raises(RecipeError, match=f"Did you mean {hint}"):
        recipes.resolve(name)


def test_the_nearest_alias_says_what_it_is():
    with pytest.raises(RecipeError, match=r"Did you mean 'float8currentscaling' \(tensorwise\)\?"):
        recipes.resolve("Float8CurentScaling")


def test_a_recipe_that_te_does_not_have_is_not_guessed():
    with pytest.raises(RecipeError, match="whole rows"):
        recipes.resolve("rowwise")
    with pytest.raises(RecipeError, match="Allowed: bf16, delayed, tensorwise, mxfp8, blockwise, nvfp4"):
        recipes.resolve("xyzzy")


def test_what_trains_in_fp16_is_not_guessed():
    with pytest.raises(RecipeError, match="trains in BF16"):
        recipes.resolve("fp16_with_fp8_mixed")
