"""Modules with another recipe than the job's, as they are written."""

from __future__ import annotations

import pytest

from nemo_fp8_recipes import preflight, recipes
from nemo_fp8_recipes.config import compose
from nemo_fp8_recipes.errors import Fp8Error
from nemo_fp8_recipes.recipes.modules import ModuleRecipe, module_recipes_of, recipe_of_module
from nemo_fp8_recipes.recipes.schedule import schedule_of


def test_it_composes():
    config = compose(["recipe_modules=[{modules: '*.0.*linear_fc[12]', recipe: fp8_cs}]"])
    (entry,) = module_recipes_of(config, schedule_of(config))
    assert entry == ModuleRecipe("*.0.*linear_fc[12]", "tensorwise")
    mxfp8 = recipes.load("mxfp8")
    assert recipe_of_module("decoder.layers.0.mlp.linear_fc1", mxfp8, [entry]).name == "tensorwise"
    assert recipe_of_module("decoder.layers.1.mlp.linear_fc1", mxfp8, [entry]) is mxfp8


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["recipe_modules=[{modules: '', recipe: bf16}]"], "glob is empty"),
        (["recipe_modules=[{modules: '*', recipe: mxfp9}]"], "no recipe 'mxfp9'"),
        (["recipe_modules=[{modules: '*'}]"], "recipe"),
        (["recipe_modules=[{module: '*', recipe: bf16}]"], "module"),
        (["fp8_recipe=bf16", "recipe_modules=[{modules: '*', recipe: mxfp8}]"], "needs a quantised"),
        (
            [
                "fp8_recipe=tensorwise",
                "fp8_recipe.fp8_param=true",
                "recipe_modules=[{modules: '*', recipe: bf16}]",
            ],
            "stored quantised",
        ),
        (
            [
                "recipe_modules=[{modules: '*fc1', recipe: tensorwise}]",
                "recipe_schedule=[{recipe: bf16, to_step: 2}]",
            ],
            "would hold in every span",
        ),
    ],
)
def test_bad_entries_are_named(overrides, said):
    with pytest.raises(Fp8Error) as raised:
        compose(overrides)
    assert said in str(raised.value)


def test_preflight_checks_the_device_for_every_recipe_and_the_shapes_of_what_it_quantises():
    on_h100 = compose(
        ["fp8_recipe=blockwise", "hardware=h100", "recipe_modules=[{modules: '*fc2', recipe: mxfp8}]"]
    )
    (finding,) = preflight.check_job(on_h100, {}, emulated=False, runs_here=False)
    assert finding.message.startswith("In recipe_modules, mxfp8: ")
    odd = ["fp8_recipe=mxfp8", "hardware=b200", "model.ffn_hidden_size=1000"]
    codes = [finding.code for finding in preflight.check_job(compose(odd), {}, emulated=True)]
    assert "FP8-SHP-001" in codes
    spared = compose([*odd, "recipe_modules=[{modules: '*linear_fc[12]', recipe: bf16}]"])
    assert "FP8-SHP-001" not in [finding.code for finding in preflight.check_job(spared, {}, emulated=True)]
    one_layer = compose([*odd, "recipe_modules=[{modules: '*.0.*linear_fc[12]', recipe: bf16}]"])
    assert "FP8-SHP-001" in [finding.code for finding in preflight.check_job(one_layer, {}, emulated=True)]
