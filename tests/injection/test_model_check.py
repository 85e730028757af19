"""Models in which a recipe cannot run are refused before their first step."""

from __future__ import annotations

import pytest

from nemo_fp8_recipes import recipes
from nemo_fp8_recipes.errors import InjectionError
from nemo_fp8_recipes.injection import check_model, manifest, require_quantized
from tests.support.te_release import SAVED_INPUT_REFUSAL

from . import gpt

pytestmark = pytest.mark.usefixtures("megatron")


def local_spec():
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    return get_gpt_layer_local_spec()


@pytest.mark.parametrize("name", ["delayed", "tensorwise", "mxfp8", "blockwise"])
def test_a_model_built_for_the_recipe_passes(name):
    recipe = recipes.load(name)
    check_model(gpt.build(gpt.config_of(recipe)), recipe)


def test_delayed_is_refused_where_megatron_saves_the_unquantised_input():
    """Megatron sets save_original_input on attention's output projection for every recipe but delayed."""
    model = gpt.build(gpt.config_of(recipes.load("tensorwise")))
    with pytest.raises(InjectionError, match="save_original_input") as raised:
        check_model(model, recipes.load("delayed"))
    assert "decoder.layers.0.self_attention.linear_proj and 1 more" in str(raised.value)


def test_transformer_engine_would_break_there():
    """The refusal above is needed: without it the job ends in Transformer Engine, in the first step."""
    model = gpt.build(gpt.config_of(recipes.load("tensorwise")))
    model.config.fp8_recipe = "delayed"
    with pytest.raises(SAVED_INPUT_REFUSAL, match="save_original_input"):
        gpt.train_step(model)


def test_the_local_layer_spec_is_refused():
    recipe = recipes.load("mxfp8")
    model = gpt.build(gpt.config_of(recipe), spec=local_spec())
    with pytest.raises(InjectionError, match="no Transformer Engine layer"):
        check_model(model, recipe)
    check_model(model, recipes.load("bf16"))


def test_the_local_layer_spec_is_read_back_as_what_it_is():
    recipe = recipes.load("mxfp8")
    found = manifest(gpt.build(gpt.config_of(recipe), spec=local_spec()))
    assert found.row("decoder.layers.0.mlp.linear_fc1").reason_code == "not_transformer_engine"
    assert found.row("output_layer").reason_code == "output_layer"
    with pytest.raises(InjectionError, match="no module is quantised"):
        require_quantized(found, recipe)


def test_before_the_first_step_the_manifest_says_so():
    recipe = recipes.load("mxfp8")
    found = manifest(gpt.build(gpt.config_of(recipe)))
    assert {row.reason_code for row in found.rows} == {"no_forward", "output_layer"}
