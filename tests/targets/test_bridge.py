"""Bridge's fields, names and YAML, without Bridge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from nemo_fp8_recipes import cli, recipes
from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.targets import bridge
from tests.support.processes import run_python

if TYPE_CHECKING:
    import pytest


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.main(["show", *arguments, "--bridge-yaml"]) == 0
    document: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return document


def test_every_recipe_and_preset_has_a_name() -> None:
    names = bridge.registered_names()
    assert names["nemo_fp8_mxfp8"] == "mxfp8"
    assert set(names.values()) >= {*recipes.names(), "nemotron_h", "deepseek_v3"}
    assert not any("-" in name for name in names)  # Bridge turns hyphens into underscores before it looks


def test_fields_say_what_megatron_is_told() -> None:
    for name in bridge.registered_names().values():
        recipe = recipes.load(name)
        fields = bridge.fields(recipe)
        assert {key: fields[key] for key in recipe.megatron()} == recipe.megatron()
        assert fields["bf16"] is True


def test_quantised_weights_are_gathered_too() -> None:
    fields = bridge.fields(recipes.load("mxfp8", fp8_param=True))
    assert fields["fp8_param"] is fields["fp8_param_gather"] is fields["reuse_grad_buf_for_mxfp8_param_ag"]
    assert fields["fp8_param"] is True
    fields = bridge.fields(recipes.load("delayed", fp8_param=True))
    assert fields["fp8_param_gather"] is True
    assert fields["reuse_grad_buf_for_mxfp8_param_ag"] is False


def test_the_yaml_holds_the_whole_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    document = shown(capsys, "fp8_recipe=delayed", "fp8_recipe.reduce_amax=false")
    assert list(document) == ["mixed_precision"]
    section = document["mixed_precision"]
    assert section["_target_"] == "nemo_fp8_recipes.callbacks.bridge.Fp8MixedPrecision"
    assert recipes.load(section["recipe"]) == recipes.load("delayed", reduce_amax=False)
    assert (section["fp8"], section["fp8_amax_history_len"]) == ("hybrid", 1024)


def test_the_yaml_has_the_groups_that_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    document = shown(capsys, "model=llama_nemotron_nano_8b", "parallel.tp=2", "training.steps=7")
    assert set(document) == {"mixed_precision", "model", "dataset", "train", "rng"}
    model = document["model"]
    assert (model["num_layers"], model["activation_func"], model["gated_linear_unit"]) == (32, "silu", True)
    assert model["tensor_model_parallel_size"] == 2
    assert document["train"]["train_iters"] == 7
    document = shown(capsys, "optimizer.lr=1e-3")
    assert document["optimizer"]["lr"] == 1e-3
    assert document["scheduler"]["lr_warmup_iters"] == 10


def test_a_hybrid_model_is_left_to_bridges_own_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "model=nemotron_h_8b", "--bridge-yaml"]) == ConfigError.exit_code
    assert "Bridge's own model recipes" in capsys.readouterr().err


def test_without_bridge_it_says_what_to_install() -> None:
    hidden = "import sys; sys.modules['megatron.bridge'] = None\n"  # where it is installed
    done = run_python(hidden + "import nemo_fp8_recipes.callbacks.bridge", check=False)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "Megatron-Bridge is not installed" in last or "does not import" in last
    assert bridge.VERSIONS in last
    for version in ("0.6.2", "0.19.2", "0.3.1", "0.16.1"):
        assert version in bridge.VERSIONS
