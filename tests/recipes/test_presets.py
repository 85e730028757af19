"""Presets: each against the factory it is named after, and against what its YAML composes to."""

import os

import pytest
from omegaconf import OmegaConf

from nemo_fp8_recipes import config, recipes
from nemo_fp8_recipes.errors import RecipeError
from tests.recipes import factories

RECORD = factories.record()
FACTORIES = [
    (package, name)
    for package, entry in RECORD.items()
    for name in entry["factories"]
    if not name.startswith("fp16")
]
# Where the field of a factory is not a field of TransformerConfig of the same name.
RENAMED = {"fp8_param_gather": "fp8_param", "fp4_param_gather": "fp4_param"}
# Fields about the precision of everything else, or the buffers of data parallelism.
NOT_THE_RECIPES = {
    "precision",
    "bf16",
    "autocast_enabled",
    "grad_reduce_in_fp32",
    "reuse_grad_buf_for_mxfp8_param_ag",
}


@pytest.mark.parametrize(("package", "name"), FACTORIES)
def test_a_preset_sets_what_the_factory_sets(package, name):
    settings = RECORD[package]["factories"][name]
    fields = recipes.load(name).megatron()
    compared = 0
    for field, value in settings.items():
        if field in NOT_THE_RECIPES:
            continue
        compared += 1
        assert fields.get(RENAMED.get(field, field), False) == value, field
    assert compared or name == "bf16_mixed"
    # and nothing that the factory leaves alone
    untouched = {"num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"} - set(settings)
    assert {field: fields.get(field, 0) for field in untouched} == dict.fromkeys(untouched, 0)


@pytest.mark.parametrize("package", factories.FILES)
def test_the_record_is_what_the_package_says(package):
    at_hand = factories.installed(package)
    if at_hand is None:
        assert not os.environ.get(factories.REQUIRED), f"{package} is not in {factories.DIRECTORIES}"
        pytest.skip(f"{package} is neither installed nor in {factories.DIRECTORIES}")
    version, source = at_hand
    if version != RECORD[package]["version"]:
        pytest.skip(f"{package} {version} is not {RECORD[package]['version']}, which is recorded")
    assert factories.read(source) == RECORD[package]["factories"]


def test_every_factory_is_known():
    """FP16 ones are refused by name; of the others each is a preset, an alias or the baseline."""
    for package, entry in RECORD.items():
        assert len(entry["factories"]) >= 12, package
        for name in entry["factories"]:
            if name.startswith("fp16"):
                with pytest.raises(RecipeError, match="trains in BF16"):
                    recipes.resolve(name)
            else:
                assert recipes.resolve(name)


@pytest.mark.parametrize("name", recipes.presets())
def test_yaml_and_python_say_the_same(name):
    composed = config.compose([f"fp8_recipe={name}"]).fp8_recipe
    assert composed.preset == name
    assert recipes.load(composed) == recipes.load(name)
    assert composed.name == recipes.presets()[name].base
    node = OmegaConf.to_container(composed)
    assert {key: node[key] for key in recipes.presets()[name].options} == recipes.presets()[name].options


@pytest.mark.parametrize("name", recipes.presets())
def test_a_preset_cites_its_source(name):
    assert "Source: " in recipes.presets()[name].about


def test_papers():
    deepseek = recipes.load("deepseek_v3").operands()
    assert {plan.format for plan in deepseek.values()} == {"e4m3"}
    assert [deepseek[name].block for name in recipes.OPERANDS] == [(1, 128), (128, 128), (1, 128)]
    assert not any(plan.power_of_two for plan in deepseek.values())
    assert recipes.load("mxfp8_pretraining") == recipes.load("mxfp8", fp8_format="e4m3")


def test_a_preset_can_be_changed():
    recipe = recipes.load("nemotron_h", fp8_param=False)
    assert (recipe.num_layers_at_start_in_bf16, recipe.fp8_param) == (2, False)
    composed = config.compose(["fp8_recipe=nemotron_h", "fp8_recipe.fp8_param=false"])
    assert recipes.load(composed.fp8_recipe) == recipe


@pytest.mark.parametrize("preset", ["nemotron_x", 3])
def test_a_preset_that_is_none(preset):
    with pytest.raises(RecipeError, match=f"There is no preset '{preset}'"):
        recipes.load({"name": "mxfp8", "preset": preset})


def test_a_published_model_names_a_recipe():
    for name in config.options("model"):
        published = config.compose([f"model={name}"]).model.published
        assert recipes.resolve(published.fp8_recipe).choice == published.fp8_recipe
