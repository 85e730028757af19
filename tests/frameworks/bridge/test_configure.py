"""The ways in which a Bridge user says which recipe: name, override, YAML; and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_fp8_recipes.errors import InjectionError


@pytest.fixture
def process(tmp_path: Path) -> Any:
    """Bridge's own processing of a config file and overrides, on a fresh job."""
    from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides

    import nemo_fp8_recipes.callbacks.bridge  # noqa: F401  # as a user's script imports it
    from tests.frameworks.bridge.jobs import job

    def processed(*overrides: str, yaml: str | None = None, before: Any = "bf16_mixed") -> Any:
        file = None
        if yaml is not None:
            file = tmp_path / "fp8.yaml"
            file.write_text(yaml)
        return process_config_with_overrides(job(before, steps=1), file and str(file), list(overrides))

    return processed


def show(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "nemo_fp8_recipes", "show", *arguments, "--bridge-yaml"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def te_classes(config: Any) -> set[tuple[str, str]]:
    from tests.frameworks.bridge.jobs import run

    return {(type(r).__name__, r.fp8_format.name) for r in run(config).recipes.values()}


@pytest.mark.parametrize("name", ["nemo_fp8_mxfp8", "nemo-fp8-mxfp8"])
def test_a_name_on_bridges_command_line(process: Any, name: str) -> None:
    assert te_classes(process(f"mixed_precision={name}")) == {("MXFP8BlockScaling", "E4M3")}


def test_an_unknown_name_lists_ours(process: Any) -> None:
    from tests.frameworks.bridge.jobs import run

    with pytest.raises(ValueError, match="nemo_fp8_mxfp8"):
        run(process("mixed_precision=nemo_fp8_mxfp9"))


def test_the_composed_yaml_brings_every_option_and_the_groups_that_are_named(
    process: Any, tmp_path: Path
) -> None:
    from nemo_fp8_recipes.callbacks.bridge import Fp8Callback
    from tests.frameworks.bridge.jobs import LINEARS, run

    yaml = show(
        "fp8_recipe=delayed",
        "fp8_recipe.amax_history_len=4",
        "fp8_recipe.reduce_amax=false",
        "model=nemotron_tiny",
        "model.num_layers=2",
        "model.seq_length=64",
        "training.steps=2",
    )
    config = process(yaml=yaml)
    callback = Fp8Callback(tmp_path / "run")
    seen = run(config, callback)
    assert len(seen.losses) == 2
    assert callback.way == "get_fp8_recipe"
    (recipe,) = {id(recipe): recipe for recipe in seen.recipes.values()}.values()
    assert (recipe.amax_history_len, recipe.reduce_amax) == (4, False)
    assert len(callback.manifest.quantized()) == 2 * len(LINEARS)
    assert config.model.activation_func.__name__ == "squared_relu"
    assert config.optimizer.lr == 1e-3  # a group that was not named


@pytest.mark.parametrize("before", ["bf16_mixed", "object"])
def test_the_yaml_wins_over_the_precision_that_was_there(process: Any, before: str) -> None:
    from megatron.bridge.training.mixed_precision import get_mixed_precision_config

    was = before if before != "object" else get_mixed_precision_config("bf16_with_fp8_delayed_scaling_mixed")
    config = process(yaml=show("fp8_recipe=tensorwise"), before=was)
    assert te_classes(config) == {("Float8CurrentScaling", "HYBRID")}


# -- refused before the first step -----------------------------------------------------------------------


def refused(config: Any, match: str, *callbacks: Any) -> None:
    from nemo_fp8_recipes.callbacks.bridge import active
    from tests.frameworks.bridge.jobs import Seen, pretrain

    seen = Seen()
    from megatron.bridge.training.gpt_step import forward_step

    with pytest.raises(InjectionError, match=match):
        pretrain(config, forward_step, callbacks=[*callbacks, seen])
    assert seen.losses == []
    active.end()
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_changed_field_that_contradicts_the_recipe(process: Any) -> None:
    config = process("mixed_precision.fp8=hybrid", yaml=show("fp8_recipe=mxfp8"))
    refused(config, r"mixed_precision\.fp8=hybrid while its recipe 'mxfp8' says fp8=e4m3")


def test_fp8_settings_of_the_users_own_in_the_model_config() -> None:
    from tests.frameworks.bridge.jobs import job

    own = {"fp8": "hybrid", "fp8_recipe": "delayed", "fp8_amax_compute_algo": "max"}
    refused(job("nemo_fp8_mxfp8", **own), r"The model config says fp8=hybrid, and mixed_precision brings")


def test_a_recipe_given_twice(tmp_path: Path) -> None:
    from nemo_fp8_recipes.callbacks.bridge import Fp8Callback
    from tests.frameworks.bridge.jobs import job

    refused(job("nemo_fp8_mxfp8"), "given twice", Fp8Callback(tmp_path, recipe="delayed"))
    refused(job("nemo_fp8_mxfp8"), "Two Fp8Callbacks", Fp8Callback(tmp_path), Fp8Callback(tmp_path))


def test_a_recipe_injected_around_it() -> None:
    import nemo_fp8_recipes as fp8
    from nemo_fp8_recipes.callbacks.bridge import mixed_precision
    from tests.frameworks.bridge.jobs import job

    with fp8.inject(fp8.load("delayed")):
        refused(job(mixed_precision("tensorwise", use_power_2_scales=True)), "injected already")


@pytest.mark.parametrize("theirs", ["bf16_mixed", "bf16_with_fp8_current_scaling_mixed"])
def test_a_callback_whose_recipe_came_too_late(tmp_path: Path, theirs: str) -> None:
    from nemo_fp8_recipes.callbacks.bridge import Fp8Callback
    from tests.frameworks.bridge.jobs import job

    callback = Fp8Callback(tmp_path, recipe="mxfp8")
    # Bridge's FP8 presets keep their weights quantised.
    config = job(theirs) if theirs == "bf16_mixed" else job("bf16_mixed")
    refused(config, "built before a recipe could be injected", callback)


def test_a_model_without_transformer_engine_layers(tmp_path: Path) -> None:
    from megatron.bridge.models.gpt_provider import local_layer_spec

    from nemo_fp8_recipes.callbacks.bridge import Fp8Callback
    from tests.frameworks.bridge.jobs import job

    config = job("nemo_fp8_mxfp8", transformer_layer_spec=local_layer_spec)
    refused(config, "no Transformer Engine layer", Fp8Callback(tmp_path))


def test_megatron_without_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import fp8_utils

    from tests.frameworks.bridge.jobs import job

    monkeypatch.setattr(fp8_utils, "HAVE_TE", False)
    refused(job("nemo_fp8_delayed"), "without Transformer Engine")
