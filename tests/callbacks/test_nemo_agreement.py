"""Plugin, configs and recipe must say the same. Configs are looked at by their attributes: no NeMo here."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_fp8_recipes import recipes
from nemo_fp8_recipes.callbacks import nemo_agreement as agreement
from nemo_fp8_recipes.errors import ConfigError, InjectionError
from nemo_fp8_recipes.targets.nemo import dtype_fields, plugin_arguments

RECIPES = ("delayed", "tensorwise", "mxfp8", "blockwise", "nvfp4")


def plugin(recipe: str | None = None, **fields: Any) -> SimpleNamespace:
    """NeMo's DtypeConfig: with NeMo's own defaults, or as made from a recipe."""
    silent = {"fp8": None, "fp8_recipe": "delayed", "fp8_amax_history_len": 1, "fp4": None}
    said = dtype_fields(recipes.load(recipe)) if recipe else silent
    return SimpleNamespace(bf16=True, fp16=False, **{**said, **fields})


@dataclass
class ModelConfig:
    """A Megatron config's fields, with its defaults."""

    fp8: str | None = None
    fp8_recipe: str | None = "delayed"
    fp4: str | None = None
    fp8_amax_history_len: int = 1
    first_last_layers_bf16: bool = False
    num_layers: int = 4


@pytest.mark.parametrize("name", RECIPES)
def test_a_plugin_made_from_the_recipe_agrees(name: str) -> None:
    recipe = recipes.load(name)
    agreement.check_plugin(recipe, plugin(name))
    arguments = plugin_arguments(recipe)
    assert arguments["precision"] == "bf16-mixed"
    assert arguments["fp8_recipe" if recipe.precision == "fp8" else "fp4_recipe"] == name


@pytest.mark.parametrize("name", ["bf16", *RECIPES])
def test_a_silent_plugin_is_given_the_recipe(name: str) -> None:
    recipe, silent = recipes.load(name), plugin()
    agreement.check_plugin(recipe, silent)
    agreement.set_plugin(recipe, silent)
    assert (silent.fp8, silent.fp4) == (dtype_fields(recipe)["fp8"], dtype_fields(recipe)["fp4"])
    assert silent.fp8_recipe == (name if recipe.precision == "fp8" else None)


@pytest.mark.parametrize(
    ("recipe", "found", "key"),
    [
        ("mxfp8", plugin("delayed"), "fp8"),
        ("tensorwise", plugin("delayed"), "fp8_recipe"),
        ("bf16", plugin("mxfp8"), "fp8"),
        ("nvfp4", plugin("mxfp8"), "fp8"),
        ("delayed", plugin("delayed", fp8_amax_history_len=1), "fp8_amax_history_len"),
        ("tensorwise", plugin("tensorwise", first_last_layers_bf16=True), "first_last_layers_bf16"),
        ("mxfp8", plugin("mxfp8", fp8_param=True), "fp8_param_gather"),
    ],
)
def test_a_plugin_that_disagrees_is_named_by_its_argument(recipe: str, found: Any, key: str) -> None:
    with pytest.raises(InjectionError, match="precision plugin says") as error:
        agreement.check_plugin(recipes.load(recipe), found)
    assert error.value.key == key
    assert "precision_plugin(recipe)" in str(error.value)


def test_history_length_of_another_kind_means_nothing() -> None:
    agreement.check_plugin(recipes.load("mxfp8"), plugin("mxfp8", fp8_amax_history_len=1))


@pytest.mark.parametrize("found", [None, SimpleNamespace(bf16=False, fp16=True)])
def test_a_plugin_that_does_not_train_in_bf16_is_refused(found: Any) -> None:
    with pytest.raises(InjectionError, match="does not train in BF16"):
        agreement.check_plugin(recipes.load("mxfp8"), found)


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"fp8": "hybrid"}, "fp8"),
        ({"fp4": "e2m1"}, "fp4"),
        ({"fp8_amax_history_len": 7}, "fp8_amax_history_len"),
    ],
)
def test_the_users_own_settings_are_not_overwritten_in_silence(fields: dict[str, Any], key: str) -> None:
    agreement.check_model_config(recipes.load("mxfp8"), ModelConfig())
    agreement.check_model_config(recipes.load("mxfp8"), ModelConfig(fp8="e4m3", fp8_recipe="mxfp8"))
    with pytest.raises(InjectionError, match="by itself; NeMo would overwrite it") as error:
        agreement.check_model_config(recipes.load("mxfp8"), ModelConfig(**fields))
    assert error.value.key == key


def test_too_many_layers_in_bf16_leave_nothing_to_quantise() -> None:
    recipe = recipes.load("tensorwise", num_layers_at_start_in_bf16=2, num_layers_at_end_in_bf16=2)
    config = SimpleNamespace(**recipe.megatron(), num_layers=4)
    with pytest.raises(InjectionError, match="keeps 4 layers in BF16 and the model has 4"):
        agreement.check_after_copy(recipe, config)


def test_what_the_configs_constructor_refuses_is_refused_after_the_copy() -> None:
    class Checked(SimpleNamespace):
        def __post_init__(self) -> None:
            raise ValueError("moe_act recompute for fp8 needs something else.")

    recipe = recipes.load("mxfp8")
    with pytest.raises(InjectionError, match=r"Megatron refuses .*moe_act recompute for fp8"):
        agreement.check_after_copy(recipe, Checked(**recipe.megatron(), num_layers=4))


def test_the_callback_says_what_to_install_where_nemo_is_absent() -> None:
    pytest.importorskip("torch")
    try:
        import nemo.collections.llm
    except ImportError:
        with pytest.raises(ConfigError, match="nemo_toolkit"):
            from nemo_fp8_recipes.callbacks import nemo  # noqa: F401
    else:
        pytest.skip("NeMo is installed here")


def test_delayed_state_is_read_without_running_the_pickle() -> None:
    torch = pytest.importorskip("torch")
    from nemo_fp8_recipes.callbacks.nemo_delayed_state import read_extra_state, take_out
    from nemo_fp8_recipes.errors import CheckpointError

    state = {"scale_fwd": torch.tensor([2.0, 3.0]), "amax_history_fwd": torch.rand(4, 2), "recipe": None}
    data = torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)
    found = read_extra_state(data)
    assert torch.equal(found["amax_history_fwd"], state["amax_history_fwd"])
    assert set(found) == {"scale_fwd", "amax_history_fwd"}
    loaded = {"module.fc1._extra_state": data, "module.fc1.weight": torch.ones(1)}
    assert set(take_out(loaded)) == {"module.fc1"}
    assert loaded["module.fc1._extra_state"].numel() == 0

    class Harmful:
        def __reduce__(self) -> Any:
            return print, ("run",)

    with pytest.raises(CheckpointError, match=r"builtins\.print"):
        read_extra_state(io.BytesIO(pickle.dumps({"scale_fwd": Harmful()})))
