"""NeMo-Run: the callback as `run.Config` in one of NeMo's recipes, and on its command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_fp8_recipes.errors import ConfigError, RecipeError


def small(recipe: Any) -> Any:
    """NeMo's Nemotron-3 4B recipe, its sizes those of a machine with no GPU."""
    import nemo_run as run

    from tests.frameworks.nemo import jobs

    for key, value in {
        "num_layers": 3,
        "hidden_size": 128,
        "ffn_hidden_size": 256,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 32,
        "seq_length": 64,
    }.items():
        setattr(recipe.model.config, key, value)
    tokenizer = run.Config(jobs.Bytes)
    recipe.data.tokenizer = tokenizer
    recipe.data.num_workers = 0
    recipe.model.tokenizer = tokenizer
    recipe.trainer.max_steps = 2
    recipe.trainer.limit_val_batches = 0
    recipe.trainer.num_sanity_val_steps = 0
    recipe.trainer.val_check_interval = None
    recipe.log = None
    recipe.resume = None
    return recipe


def test_nemos_own_recipe_takes_it_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fiddle as fdl
    from nemo.collections import llm

    from nemo_fp8_recipes.callbacks.nemo_run import add_fp8
    from nemo_fp8_recipes.emulation import trace

    monkeypatch.chdir(tmp_path)  # where NeMo's logger writes
    recipe = small(
        llm.nemotron3_4b.pretrain_recipe(
            num_gpus_per_node=1, tensor_parallelism=1, seq_length=64, global_batch_size=2, micro_batch_size=2
        )
    )
    add_fp8(recipe, "mxfp8", {"fp8_format": "hybrid"}, run_dir=str(tmp_path / "run"), log_every=1)
    pretrain = fdl.build(recipe)
    with trace() as observed:
        pretrain()
    quantised = [gemm for gemm in observed.gemms if gemm.quantized]
    assert len(quantised) == 3 * 4 * 3 * 2  # layers, linears, GEMMs of a linear, steps
    assert {gemm.b.format for gemm in quantised if gemm.layout != "TN"} == {"e5m2"}
    assert (tmp_path / "run" / "manifest.json").is_file()


def test_the_factories_are_found_by_the_command_line() -> None:
    from nemo.collections import llm
    from nemo_run.cli.cli_parser import parse_factory

    from nemo_fp8_recipes.callbacks.nemo import Fp8RecipeCallback

    home = "nemo_fp8_recipes.callbacks.nemo_run"
    found = parse_factory(
        llm.pretrain, "factory", Any, f"{home}.pretrain(base=nemotron3_8b,fp8_recipe=delayed)"
    )
    (callback,) = [config for config in found.trainer.callbacks if config.__fn_or_cls__ is Fp8RecipeCallback]
    assert callback.fp8_recipe == "delayed"
    for name in ("delayed", "tensorwise", "mxfp8", "blockwise", "nvfp4"):
        assert parse_factory(llm.pretrain, "callbacks", Any, f"{home}.{name}").fp8_recipe == name


def test_what_does_not_exist_is_named_at_once() -> None:
    from nemo_fp8_recipes.callbacks.nemo_run import callback, pretrain

    with pytest.raises(RecipeError, match="no recipe 'mxfp9'"):
        callback("mxfp9")
    with pytest.raises(ConfigError, match=r"no pre-training recipe 'nemotron3_5b'.*nemotron3_"):
        pretrain("nemotron3_5b")
