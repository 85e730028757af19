"""`nemo-fp8 train framework=bridge`, as typed, and beside the reference job on the same Megatron-Core."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_fp8_recipes import cli
from nemo_fp8_recipes.telemetry import store
from nemo_fp8_recipes.training.metrics import read_metrics

SMALL = [
    "device=emulated",
    "hardware=b200",
    "model.num_layers=3",
    "model.hidden_size=128",
    "model.ffn_hidden_size=256",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.seq_length=32",
    "data=mock",
    "training.steps=4",
    "training.eval_batches=1",
    "telemetry.log_every=1",
]


def train(directory: Path, *overrides: str) -> int:
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    status = cli.main(["train", *SMALL, f"run_dir={directory}", *overrides])
    FP8GlobalStateManager.reset()
    return status


def rows(directory: Path, **wanted: Any) -> dict[tuple[Any, ...], Any]:
    return {
        (row["step"], row["module"], row["tensor"], row["stat"]): row["value"]
        for row in store.read(directory, **wanted).to_pylist()
    }


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("delayed", []),
        ("tensorwise", []),
        ("tensorwise", ["fp8_recipe.fp8_param=true"]),
        ("mxfp8", []),
        ("blockwise", []),
        ("nvfp4", ["fp8_recipe.disable_stochastic_rounding=true"]),
    ],
)
def test_both_frameworks_log_the_same_amax_and_scales(
    tmp_path: Path, recipe: str, options: list[str]
) -> None:
    """Same seed, so the same initial weights; same data; same recipe."""
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator

    for framework in ("bridge", "megatron_core"):
        assert train(tmp_path / framework, f"framework={framework}", f"fp8_recipe={recipe}", *options) == 0
        unset_num_microbatches_calculator()
    ours, theirs = rows(tmp_path / "megatron_core"), rows(tmp_path / "bridge")
    first = {key: value for key, value in theirs.items() if key[0] == 1}
    assert {module for _, module, *_ in first} == {
        f"decoder.layers.{layer}.{name}"
        for layer in range(3)
        for name in (
            "self_attention.linear_qkv",
            "self_attention.linear_proj",
            "mlp.linear_fc1",
            "mlp.linear_fc2",
        )
    }
    assert first == {key: value for key, value in ours.items() if key[0] == 1}
    losses = [
        [row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("bridge", "megatron_core")
    ]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_the_run_directory_and_resuming_in_it(tmp_path: Path) -> None:
    delayed = [
        "framework=bridge",
        "fp8_recipe=delayed",
        "fp8_recipe.amax_history_len=4",
        "training.save_every=2",
    ]
    assert train(tmp_path / "whole", *delayed) == 0
    assert train(tmp_path / "parts", *delayed, "training.stop_at_step=2") == 0
    record = json.loads((tmp_path / "parts" / "run.json").read_text())
    assert record["status"] == "interrupted"
    assert train(tmp_path / "parts", *delayed, "training.resume=auto") == 0
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert [row["loss"] for row in read_metrics(tmp_path / "parts" / "metrics.jsonl")] == [
        row["loss"] for row in read_metrics(tmp_path / "whole" / "metrics.jsonl")
    ]
    record = json.loads((tmp_path / "parts" / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["versions"]["megatron-bridge"]
    assert record["result"]["held_out_loss"] > 0
    assert [resume["step"] for resume in record["resumes"]] == [2]
    manifest = json.loads((tmp_path / "whole" / "manifest.json").read_text())
    assert manifest["way_in"] == "config"
    assert {"config.yaml", "telemetry", "tensorboard", "checkpoints", "bridge.log"} <= {
        entry.name for entry in (tmp_path / "whole").iterdir()
    }
    other = train(tmp_path / "parts", *delayed, "training.resume=auto", "model.num_layers=2")
    assert other == 2


def test_telemetry_and_alerts_are_those_of_the_configuration(tmp_path: Path) -> None:
    rule = "+alerts.custom.mine={stat: amax, tensor: input, above: 0, action: %s, message: '{value}'}"
    asked = [
        "framework=bridge",
        "fp8_recipe=mxfp8",
        "telemetry.stats_every=3",
        "telemetry.whatif=['*.layers.0.*/input']",
    ]
    saved, stopped = tmp_path / "saved", tmp_path / "stopped"
    assert train(saved, *asked, rule % "checkpoint") == 0
    assert json.loads((saved / "run.json").read_text())["status"] == "finished"
    assert [path.name for path in (saved / "checkpoints").glob("iter_*")] == ["iter_0000002"]
    logged = rows(saved)
    assert {step for step, _, _, stat in logged if stat == "sqnr"} == {1, 3}
    assert {
        module.split(".")[2] for _, module, _, stat in logged if stat.startswith("whatif/tensorwise/")
    } == {"0"}

    # The values of step 1 arrive when step 2 begins, which is still run to its end.
    assert train(stopped, *asked, rule % "stop") == 0
    assert json.loads((stopped / "run.json").read_text())["status"] == "interrupted"
    assert [row["step"] for row in read_metrics(stopped / "metrics.jsonl")] == [1, 2]
    assert train(stopped, *asked, "training.resume=auto") == 0
    assert rows(stopped) == logged


def test_errors_are_one_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "run", "framework=bridge", "fp8_recipe=mxfp8", "hardware=h100") == 2
    assert "Traceback" not in capfd.readouterr().err
