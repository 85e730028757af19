"""What cannot work is refused before the first step, by one clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_fp8_recipes.errors import CheckpointError, InjectionError


def refused(job: Any) -> InjectionError:
    with pytest.raises(InjectionError) as error:
        job.fit()
    assert not job.seen.losses
    return error.value


def test_plugin_and_recipe_disagree(tmp_path: Path) -> None:
    from tests.frameworks.nemo import jobs

    callback = jobs.Fp8RecipeCallback("mxfp8", run_dir=tmp_path)
    job = jobs.Job(tmp_path, callbacks=[callback], plugin=jobs.precision_plugin("delayed"))
    error = refused(job)
    assert "plugin says fp8=hybrid" in str(error)
    assert "'mxfp8'" in str(error)
    assert error.key == "fp8"


def test_an_option_of_the_plugin_disagrees(tmp_path: Path) -> None:
    from tests.frameworks.nemo import jobs

    callback = jobs.Fp8RecipeCallback("delayed", run_dir=tmp_path)
    plugin = jobs.precision_plugin("delayed", fp8_amax_history_len=1)
    error = refused(jobs.Job(tmp_path, callbacks=[callback], plugin=plugin))
    assert error.key == "fp8_amax_history_len"
    assert error.allowed == ("1024",)


def test_recipe_given_twice(tmp_path: Path) -> None:
    from tests.frameworks.nemo import jobs

    twice = [jobs.Fp8RecipeCallback(name, run_dir=tmp_path) for name in ("mxfp8", "delayed")]
    job = jobs.Job(tmp_path, callbacks=twice, plugin=jobs.precision_plugin("mxfp8"))
    assert "2 Fp8RecipeCallbacks (mxfp8, delayed)" in str(refused(job))


def test_model_built_before_the_callback(tmp_path: Path) -> None:
    from tests.frameworks.nemo import jobs

    job = jobs.job("mxfp8", tmp_path)
    job.model.module = jobs.torch.nn.Linear(1, 1)
    assert "built before Fp8RecipeCallback could inject" in str(refused(job))


def test_fp8_settings_of_the_users_own(tmp_path: Path) -> None:
    from tests.frameworks.nemo import jobs

    job = jobs.job("mxfp8", tmp_path, model_options={"fp8": "hybrid", "fp8_recipe": "tensorwise"})
    error = refused(job)
    assert "The model config says fp8=hybrid by itself" in str(error)
    assert error.key == "fp8"


def test_the_local_layer_spec_quantises_nothing(tmp_path: Path) -> None:
    from nemo.collections.llm.gpt.model.base import local_layer_spec

    from tests.frameworks.nemo import jobs

    options = {
        "transformer_layer_spec": local_layer_spec,
        "persist_layer_norm": False,
        "layernorm_zero_centered_gamma": False,
    }
    job = jobs.job("mxfp8", tmp_path, model_options=options)
    assert "no Transformer Engine layer" in str(refused(job))


def test_a_combination_that_setattr_lets_through(tmp_path: Path) -> None:
    from tests.frameworks.nemo import jobs

    options = {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}
    job = jobs.job("delayed", tmp_path, model_options=options)
    assert "layernorm" in str(refused(job))


def test_missing_transformer_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import fp8_utils

    from tests.frameworks.nemo import jobs

    monkeypatch.setattr(fp8_utils, "HAVE_TE", False)
    assert "without Transformer Engine" in str(refused(jobs.job("mxfp8", tmp_path)))


def test_after_a_refusal_the_next_job_trains(tmp_path: Path) -> None:
    from tests.frameworks.nemo import jobs

    refused(jobs.job("mxfp8", tmp_path / "a", model_options={"fp8": "hybrid"}))
    jobs.clean()
    assert len(jobs.job("mxfp8", tmp_path / "b", steps=1).fit()) == 1


def test_a_checkpoint_of_another_recipe(tmp_path: Path) -> None:
    from tests.frameworks.nemo import jobs

    saved: dict[str, Any] = {}
    jobs.Fp8RecipeCallback("delayed", run_dir=tmp_path).on_save_checkpoint(None, None, saved)
    with pytest.raises(CheckpointError, match="trained with fp8_recipe=delayed, this run has mxfp8"):
        jobs.Fp8RecipeCallback("mxfp8", run_dir=tmp_path).on_load_checkpoint(None, None, saved)
