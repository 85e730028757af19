"""Single modules with another recipe than the rest of the model."""

from __future__ import annotations

import pytest

from nemo_fp8_recipes import recipes
from nemo_fp8_recipes.callbacks.megatron_core import Fp8Run
from nemo_fp8_recipes.errors import ConfigError, InjectionError
from nemo_fp8_recipes.injection import assign_module_recipes, complaints
from nemo_fp8_recipes.recipes.modules import ModuleRecipe
from nemo_fp8_recipes.recipes.schedule import Schedule, Span

from . import gpt

pytestmark = pytest.mark.usefixtures("megatron")

FC2 = "decoder.layers.{}.mlp.linear_fc2"


def one_step(recipe, modules, *, schedule=None, steps=1):
    config = gpt.config_of(recipe)
    with Fp8Run(recipe, modules=modules, schedule=schedule) as run:
        run.check(config)
        model = gpt.build(config)
        run.model_built(model)
        for number in range(1, steps + 1):
            run.begin_step(number)
            gpt.train_step(model, seed=number)
            run.end_step(number, {})
    return run.manifest


def found(manifest):
    return {row.module: row.recipe for row in manifest.rows if row.module.endswith(gpt.LINEARS)}


@pytest.mark.parametrize("name", ["delayed", "mxfp8", "nvfp4"])
def test_modules_stay_in_bf16(name):
    manifest = one_step(recipes.load(name), [ModuleRecipe("*.linear_fc2", "bf16")])
    for module, recipe in found(manifest).items():
        assert recipe == ("bf16" if module.endswith("linear_fc2") else name)
    assert manifest.row(FC2.format(0)).reason_code == "per_module_override"


def test_the_first_entry_that_matches_decides_and_may_quantise_otherwise():
    manifest = one_step(
        recipes.load("mxfp8"),
        [ModuleRecipe("decoder.layers.1.mlp.*", "bf16"), ModuleRecipe("*linear_fc2", "tensorwise")],
    )
    assert found(manifest)[FC2.format(0)] == "tensorwise"
    assert found(manifest)[FC2.format(1)] == "bf16"
    assert found(manifest)["decoder.layers.1.self_attention.linear_qkv"] == "mxfp8"
    assert found(manifest)["decoder.layers.0.mlp.linear_fc1"] == "mxfp8"


def test_a_module_quantised_that_was_to_stay_in_bf16_is_complained_about_and_the_other_way_round():
    mxfp8 = recipes.load("mxfp8")
    manifest = one_step(mxfp8, [ModuleRecipe("*.0.*linear_fc2", "bf16")])
    asked = [ModuleRecipe("*.1.*linear_fc2", "bf16"), ModuleRecipe("*.0.*linear_fc2", "tensorwise")]
    assert [str(complaint) for complaint in complaints(manifest, mxfp8, asked)] == [
        f"{FC2.format(0)} is in high precision: switched off by a per-module quant_recipe",
        f"{FC2.format(1)} is quantised by mxfp8",
    ]


def test_modules_stay_in_bf16_whatever_the_schedule_says():
    mxfp8 = recipes.load("mxfp8")
    schedule = Schedule(mxfp8, (Span(recipes.load("blockwise"), 2, 2),))
    manifest = one_step(mxfp8, [ModuleRecipe("*linear_fc2", "bf16")], schedule=schedule, steps=2)
    assert set(found(manifest).values()) == {"blockwise", "bf16"}
    assert found(manifest)[FC2.format(0)] == "bf16"


def test_an_entry_that_names_no_linear_layer_ends_the_run():
    for pattern in ("*linear_fc3", "output_layer", "*core_attention"):
        with pytest.raises(InjectionError, match="names no linear layer of Transformer Engine") as raised:
            one_step(recipes.load("mxfp8"), [ModuleRecipe(pattern, "bf16")])
        assert "decoder.layers.0" in str(raised.value)


def test_what_megatron_cannot_give_to_single_modules_is_refused():
    mxfp8 = recipes.load("mxfp8")
    model = gpt.build(gpt.config_of(mxfp8))
    with pytest.raises(ConfigError, match=r"recipe_modules \*=delayed is not possible"):
        assign_module_recipes(model, mxfp8, [ModuleRecipe("*", "delayed")])
    model.config.quant_recipe = object()
    with pytest.raises(InjectionError, match="names recipes for single modules already"):
        assign_module_recipes(model, mxfp8, [ModuleRecipe("*", "bf16")])
