"""Composing a job's configuration: defaults, overrides, and one clear error for each kind of mistake."""

import dataclasses
import json
import re
import shutil

import pytest
from omegaconf import OmegaConf

from nemo_fp8_recipes import config, recipes
from nemo_fp8_recipes.config import paths
from nemo_fp8_recipes.errors import ConfigError, Fp8Error, RecipeError
from tests.support.processes import run_python


def test_the_defaults():
    composed = config.compose()
    assert composed.fp8_recipe.name == "mxfp8"
    assert (composed.model.name, composed.data.name, composed.hardware.name) == (
        "nemotron_tiny",
        "stdlib_text",
        "auto",
    )
    assert composed.device == "auto"
    assert composed.run_dir is None
    assert list(composed.preflight.ignore) == []


def test_overrides_of_every_kind():
    composed = config.compose(
        [
            "model.num_layers=2",
            "training.steps=200",
            "fp8_recipe=delayed",
            "fp8_recipe.amax_history_len=16",
            "hardware=b200",
            "parallel.tp=2",
            "preflight.ignore=[FP8-NUM-001]",
            "run_dir=/some/where",
        ]
    )
    assert (composed.model.num_layers, composed.training.steps) == (2, 200)
    assert recipes.load(composed.fp8_recipe) == recipes.Delayed(amax_history_len=16)
    assert list(composed.hardware.compute_capability) == [10, 0]
    assert composed.parallel.tp == 2
    assert list(composed.preflight.ignore) == ["FP8-NUM-001"]


@pytest.mark.parametrize("name", recipes.names())
def test_yaml_and_dataclass_say_the_same(name):
    node = OmegaConf.to_container(config.compose([f"fp8_recipe={name}"]).fp8_recipe)
    expected = recipes.load(name).to_dict()
    del expected["schema_version"]
    assert node == expected


@pytest.mark.parametrize("path", sorted(config.conf_dir().rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_key_of_the_yaml_is_explained(path):
    """By a comment behind it, or by one that heads it."""
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# "), f"{path.name} does not say what it is"
    for number, line in enumerate(lines):
        key = re.match(r"^(\s*)([\w]+|- [\w ]+):", line)
        if key is None or key.group(2) in ("name", "defaults", "preflight") or "#" in line:
            continue
        parent = next(other for other in reversed(lines[:number]) if not other.startswith(" " * 2))
        assert key.group(1), f"{path.name}: {line.strip()} is not explained"
        assert "#" in parent, f"{path.name}: {line.strip()} is not explained"


@pytest.mark.parametrize("group", [group for group in config.groups() if group != "fp8_recipe"])
def test_every_choice_of_every_group_composes_and_names_itself(group):
    for choice in config.options(group):
        assert config.compose([f"{group}={choice}"])[group].name in (choice, "adam", "default")


@pytest.mark.parametrize("name", ["ds", "Float8CurrentScaling", "fp8_mx"])
def test_other_tools_names_compose_and_are_told(name):
    composed = config.compose([f"fp8_recipe={name}"])
    assert composed.fp8_recipe.name == recipes.resolve(name).canonical
    (note,) = config.alias_notes([f"fp8_recipe={name}"])
    assert name in note
    assert composed.fp8_recipe.name in note
    assert config.alias_notes(["fp8_recipe=mxfp8", "model.num_layers=2"]) == []


MISTAKES = [
    ("fp8_recipe=mxpf8", "fp8_recipe", "Did you mean 'mxfp8'?"),
    ("fp8_recipe=null", "fp8_recipe", "bf16"),
    ("fp8_recipe.amax_history_len=16", "fp8_recipe.amax_history_len", "option of delayed"),
    ("fp8_recipe.fp8_fromat=e4m3", "fp8_recipe.fp8_fromat", "Did you mean 'fp8_format'?"),
    ("fp8_recipe.fp8_format=e5m2", "fp8_recipe.fp8_format", "e4m3, hybrid"),
    ("fp8_recipe.fp8_dpa=maybe", "fp8_recipe.fp8_dpa", "true or false"),
    ("fp8_recipe.margin=3", "fp8_recipe.margin", "change nothing"),
    ("fp8_recipe.name=delayed", "fp8_recipe.name", "fp8_recipe=delayed"),
    ("+fp8_recipe.new=1", "fp8_recipe.new", "fp8_format"),
    ("hardware=h10", "hardware", "Did you mean 'h100'?"),
    ("hardware.compute_capability=[9]", "hardware.compute_capability", "2 entries"),
    ("hardware.compute_capability=[9,x]", "hardware.compute_capability[1]", "an integer"),
    ("model=nemotron_tinny", "model", "Did you mean 'nemotron_tiny'?"),
    ("model.num_layer=3", "model.num_layer", "Did you mean 'num_layers'?"),
    ("model.num_layers=three", "model.num_layers", "an integer"),
    ("model.num_layers=2.5", "model.num_layers", "an integer"),
    ("model.num_layers=", "model.num_layers", "an integer"),
    ("model.num_layers=0", "model.num_layers", ">= 1"),
    ("model.num_layers=???", "model.num_layers", "needs a value"),
    ("model.num_layers.x=3", "model.num_layers.x", "single value"),
    ("alerts.custom.mine.above=3", "alerts.custom.mine.above", "A plus adds to it: +alerts.custom.mine"),
    ("+model.depth=3", "model.depth", "num_layers"),
    ("model.num_layers=100000000000", "model.num_layers", "<= 10000"),
    ("model.init_method_std=-1", "model.init_method_std", ">= 0"),
    ("model.init_method_std=inf", "model.init_method_std", "finite"),
    ("model.layernorm_epsilon=nan", "model.layernorm_epsilon", "finite"),
    ("optimizer.lr=inf", "optimizer.lr", "finite"),
    ("optimizer.clip_grad=nan", "optimizer.clip_grad", "finite"),
    ("alerts.underflow.limit=nan", "alerts.underflow.limit", "finite"),
    ("training.steps=99999999999999999999", "training.steps", "64 bits"),
    ("data.seed=-99999999999999999999", "data.seed", "64 bits"),
    ("run_dir=", "run_dir", "is empty"),
    ("training.resume=''", "training.resume", "is empty"),
    ("~model.num_layers", "model.num_layers", "needs a value"),
    ("~training.steps", "training.steps", "needs a value"),
    ("~training.steps=300", "training.steps", "needs a value"),
    ("~preflight", "preflight", "needs a value"),
    ("~nothing", "nothing", "There is no key"),
    ("~model", "model", "one choice"),
    ("model@other=nemotron_tiny", "model", "elsewhere"),
    ("model.num_layers=${training.stps}", "model.num_layers", "training.stps"),
    ("trainin.steps=3", "trainin", "Did you mean 'training'?"),
    ("training.steps=1,2", "training.steps", "several values"),
    ("parallel.tp=0", "parallel.tp", ">= 1"),
    ("parallel.sequence=true", "parallel.sequence", "parallel.tp"),
    ("device=emulatd", "device", "Did you mean 'emulated'?"),
    ("recipe_schedule={recipe: bf16}", "recipe_schedule", "a mapping. Allowed: a list."),
    ("alerts.underflow=3", "alerts.underflow", "an integer. Allowed: a mapping"),
    ("debug=1", "debug", "true or false"),
    ("preflight.ignore=FP8-HW-001", "preflight.ignore", "a list"),
    ("hydra.run.dir=x", "hydra.run.dir", "no Hydra application"),
]


@pytest.mark.parametrize(("override", "key", "said"), MISTAKES)
def test_a_mistake_is_one_error_that_names_the_key(override, key, said):
    with pytest.raises((ConfigError, RecipeError)) as caught:
        config.compose([override])
    assert caught.value.key == key
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("mxfp8", "fp8_recipe=mxfp8"),
        ("steps", "key=value"),
        ("--multirun", "--multirun"),
        ("model.num_layers=[1", "cannot be read"),
        ("=3", "no key"),
        ("a b=c", "a character that needs quotes"),
        ("model.schéma=c", "a character that needs quotes"),
    ],
)
def test_what_is_no_override(argument, said):
    with pytest.raises(ConfigError) as caught:
        config.compose([argument])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "Exception" not in str(caught.value)


def test_composing_leaves_hydra_as_it_was():
    """A program that uses Hydra itself goes on with its own."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    with hydra.initialize_config_dir(str(config.conf_dir()), version_base="1.3"):
        config.compose()
        with pytest.raises(Fp8Error):
            config.compose(["nothing=1"])
        assert hydra.compose("config").fp8_recipe.name == "mxfp8"
    assert not GlobalHydra.instance().is_initialized()


def test_composing_imports_no_torch():
    run_python(
        """
        import sys
        from nemo_fp8_recipes import config
        config.compose(["fp8_recipe=ds"])
        assert not {"torch", "numpy", "pyarrow", "transformer_engine"} & set(sys.modules)
        """
    )


def test_conf_is_found_in_a_wheel_and_in_a_checkout(tmp_path, monkeypatch):
    wheel = tmp_path / "site-packages" / "nemo_fp8_recipes"
    shutil.copytree(config.conf_dir(), wheel / "conf")
    monkeypatch.setattr(paths, "_PACKAGE", wheel)
    assert paths.conf_dir() == wheel / "conf"

    checkout = tmp_path / "checkout"
    shutil.copytree(wheel / "conf", checkout / "conf")
    monkeypatch.setattr(paths, "_PACKAGE", checkout / "nemo_fp8_recipes")
    assert paths.conf_dir() == checkout / "conf"

    monkeypatch.setattr(paths, "_PACKAGE", tmp_path / "nowhere" / "nemo_fp8_recipes")
    with pytest.raises(ConfigError, match=r"no config\.yaml"):
        paths.conf_dir()


def test_hardware_is_the_emulated_devices_own_table():
    """Preflight reads conf/hardware, emulation poses from its own table: they must not part."""
    from nemo_fp8_recipes.emulation.devices import DEVICES

    named = [name for name in config.options("hardware") if name != "auto"]
    assert sorted(DEVICES) == named
    for name in named:
        hardware, device = config.load_hardware(name), DEVICES[name]
        assert hardware.compute_capability == device.compute_capability
        assert (hardware.display_name, hardware.memory_gb) == (device.display_name, device.memory_gb)


def test_hardware_that_does_not_exist():
    with pytest.raises(ConfigError, match="Did you mean 'h200'"):
        config.load_hardware("h20")


def test_a_named_gpu_needs_its_compute_capability():
    with pytest.raises(ConfigError, match="compute_capability"):
        config.compose(["hardware=h100", "hardware.compute_capability=null"])


def test_the_composed_configuration_is_plain():
    json.dumps(OmegaConf.to_container(config.compose(), resolve=True))
    assert dataclasses.is_dataclass(config.HardwareConfig)
