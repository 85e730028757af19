"""`nemo-fp8 train framework=nemo`: the reference loop's job, through NeMo's trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_fp8_recipes.commands import train
from nemo_fp8_recipes.errors import CheckpointError, ConfigError
from nemo_fp8_recipes.injection import Manifest
from nemo_fp8_recipes.report import run as report
from nemo_fp8_recipes.telemetry import store

SAME = (
    "hardware=b200",
    "device=emulated",
    "model.num_layers=3",
    "model.hidden_size=128",
    "model.ffn_hidden_size=256",
    "data=mock",
    "training.steps=4",
    "training.global_batch_size=8",
    "training.eval_batches=1",
    "telemetry.log_every=1",
)


def run(framework: str, run_dir: Path, *overrides: str) -> report.Run:
    from tests.frameworks.nemo import jobs

    jobs.clean()
    assert train.run([f"framework={framework}", f"run_dir={run_dir}", *SAME, *overrides]) == 0
    jobs.clean()
    return report.load(run_dir)


def values(run_dir: Path) -> dict[tuple[Any, ...], Any]:
    """(step, module, tensor, stat) -> what was logged, exactly."""
    return {
        (row["step"], row["module"], row["tensor"], row["stat"]): row.get("value") or row.get("window")
        for row in store.read(run_dir).to_pylist()
    }


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("delayed", ["fp8_recipe.amax_history_len=4"]),
        ("tensorwise", []),
        ("tensorwise", ["fp8_recipe.fp8_param=true"]),
        ("mxfp8", []),
        ("blockwise", []),
        ("nvfp4", ["fp8_recipe.disable_stochastic_rounding=true"]),
    ],
)
def test_nemo_and_the_reference_loop_are_one_job(recipe: str, options: list[str], tmp_path: Path) -> None:
    overrides = [f"fp8_recipe={recipe}", *options]
    ours = run("megatron_core", tmp_path / "reference", *overrides)
    theirs = run("nemo", tmp_path / "nemo", *overrides)

    # The reported loss is averaged over micro-batches in another order; what is computed is the same.
    assert [step for step, _ in theirs.losses] == [1, 2, 3, 4]
    assert [loss for _, loss in theirs.losses] == pytest.approx([loss for _, loss in ours.losses], rel=1e-6)
    assert theirs.record["result"]["held_out_loss"] == ours.record["result"]["held_out_loss"]
    assert theirs.manifest == ours.manifest
    logged = values(tmp_path / "nemo")
    assert logged == values(tmp_path / "reference")
    assert {step for step, *_ in logged} == {1, 2, 3, 4}
    assert {module for _, module, *_ in logged} == {row.module for row in theirs.manifest.quantized()}
    for key in ("step", "learning_rate", "tokens"):
        assert [row[key] for row in theirs.metrics] == [row[key] for row in ours.metrics]
    assert [row["grad_norm"] for row in theirs.metrics] == pytest.approx(
        [row["grad_norm"] for row in ours.metrics], rel=1e-6
    )
    assert theirs.record["status"] == "finished"
    assert theirs.record["versions"]["nemo_toolkit"].startswith("2.")
    assert theirs.record["device"] == "emulated b200"


def test_stopping_and_going_on(tmp_path: Path) -> None:
    overrides = ["fp8_recipe=delayed", "fp8_recipe.amax_history_len=4", "training.save_every=2"]
    run("nemo", tmp_path / "whole", *overrides)
    cut = run("nemo", tmp_path / "cut", *overrides, "training.stop_at_step=3")
    assert cut.record["status"] == "interrupted"
    marker = tmp_path / "cut" / "checkpoints" / "step_000003" / "complete.json"
    assert json.loads(marker.read_text())["job"]["framework"] == "nemo"
    run("nemo", tmp_path / "cut", *overrides, "training.resume=auto")
    assert values(tmp_path / "cut") == values(tmp_path / "whole")
    losses = [report.load(tmp_path / name).losses for name in ("cut", "whole")]
    assert losses[0] == losses[1]
    with pytest.raises(CheckpointError, match="framework was 'nemo', is 'megatron_core'"):
        run("megatron_core", tmp_path / "cut", *overrides, "training.resume=auto")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("recipe_schedule=[{recipe: bf16, to_step: 2}]", "framework=nemo .*framework=megatron_core"),
        (
            'recipe_modules=[{modules: "*.linear_proj", recipe: bf16}]',
            "framework=nemo .*framework=megatron_core",
        ),
    ],
)
def test_what_the_trainer_would_not_do_is_refused(override: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        run("nemo", tmp_path / "run", "fp8_recipe=mxfp8", override)
    assert not (tmp_path / "run").exists()


def test_telemetry_and_alerts_are_those_of_the_configuration(tmp_path: Path) -> None:
    rule = "{stat: amax, tensor: input, above: 0, action: %s, message: '{module} is at {value}'}"
    asked = ["fp8_recipe=mxfp8", "telemetry.stats_every=3", "telemetry.whatif=['*.layers.0.*/input']"]
    saved = run("nemo", tmp_path / "saved", *asked, "+alerts.custom.mine=" + rule % "checkpoint")
    assert saved.record["status"] == "finished"
    assert [path.name for path in (tmp_path / "saved" / "checkpoints").iterdir()] == ["step_000002"]
    logged = values(tmp_path / "saved")
    assert {step for step, _, _, stat in logged if stat == "sqnr"} == {1, 3}
    assert {
        module.split(".")[2] for _, module, _, stat in logged if stat.startswith("whatif/tensorwise/")
    } == {"0"}

    # The values of step 1 arrive when step 2 begins, which is still run to its end.
    stopped = run("nemo", tmp_path / "stopped", *asked, "+alerts.custom.mine=" + rule % "stop")
    assert stopped.record["status"] == "interrupted"
    assert [step for step, _ in stopped.losses] == [1, 2]
    run("nemo", tmp_path / "stopped", *asked, "training.resume=auto")
    assert values(tmp_path / "stopped") == logged


def test_bf16_is_a_job_too(tmp_path: Path) -> None:
    found = run("nemo", tmp_path / "bf16", "fp8_recipe=bf16", "training.steps=1")
    assert isinstance(found.manifest, Manifest)
    assert not found.manifest.quantized()
