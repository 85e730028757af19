"""The command trains with every recipe: it learns, every linear is quantised as asked, and it is not BF16."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.command import Run, train

RECIPES = ("delayed", "tensorwise", "mxfp8", "blockwise", "nvfp4")
TOLERANCE = {"nvfp4": 0.05}  # of the loss against BF16; FP4 has a mantissa of one bit
STEPS = 40
Trained = Callable[[str], Run]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Runs of the same seed, one a recipe, each made once."""
    runs: dict[str, Run] = {}
    parent = tmp_path_factory.mktemp("recipes")

    def run(recipe: str) -> Run:
        if recipe not in runs:
            runs[recipe] = train(
                parent / recipe,
                f"fp8_recipe={recipe}",
                f"training.steps={STEPS}",
                "training.eval_batches=1",
                "telemetry.log_every=10",
            )
        return runs[recipe]

    return run


@pytest.mark.parametrize("recipe", RECIPES)
def test_learns_as_bf16_does_but_is_not_bf16(trained: Trained, recipe: str) -> None:
    run, baseline = trained(recipe), trained("bf16")
    assert [row["step"] for row in run.metrics] == list(range(1, STEPS + 1))
    assert run.losses[0] > 5.3  # ln 256 = 5.55: it starts knowing nothing
    assert run.losses[-1] < run.losses[0] - 1.5
    last, reference = (sum(found[-5:]) / 5 for found in (run.losses, baseline.losses))
    assert last == pytest.approx(reference, rel=TOLERANCE.get(recipe, 0.02))
    held_out = [found.record["result"]["held_out_loss"] for found in (run, baseline)]
    assert held_out[0] == pytest.approx(held_out[1], rel=TOLERANCE.get(recipe, 0.02))
    assert run.losses != baseline.losses


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_linear_is_quantised_by_the_recipe_asked_for(trained: Trained, recipe: str) -> None:
    manifest = json.loads((trained(recipe).path / "manifest.json").read_text())
    linears = [row for row in manifest["rows"] if row["module"].rpartition(".")[2].startswith("linear_")]
    assert len(linears) == 2 * 4
    assert {row["recipe"] for row in linears} == {recipe}
    assert all(row["quantized"] for row in linears)


def test_the_baseline_quantises_nothing(trained: Trained) -> None:
    manifest = json.loads((trained("bf16").path / "manifest.json").read_text())
    assert not any(row["quantized"] for row in manifest["rows"])


def test_what_the_run_leaves_and_says(trained: Trained) -> None:
    run = trained("mxfp8")
    assert run.record["status"] == "finished"
    assert run.record["recipe"]["name"] == "mxfp8"
    assert run.record["result"]["first_loss"] == run.losses[0]
    assert run.record["result"]["last_loss"] == run.losses[-1]
    assert run.record["versions"]["megatron-core"]
    assert "name: mxfp8" in (run.path / "config.yaml").read_text()
    assert list((run.path / "telemetry").glob("*.parquet"))
    for text in (
        "emulated",
        f"step {STEPS}/{STEPS}",
        "held-out loss",
        f"tensorboard --logdir {run.path}/tensorboard",
        f"nemo-fp8 report --html {run.path}",
    ):
        assert text in run.output
    assert run.errors == ""
    assert run.output.count("\nstep ") < STEPS  # rate-limited where there is no terminal
    assert run.record["device"].startswith("emulated")


def test_micro_batches_change_the_memory_and_not_the_training(trained: Trained, tmp_path: Path) -> None:
    """TE caches the quantised weight over the micro-batches of a step; a cache that is not renewed in the
    next step, or gradients that are not averaged, would show at once."""
    whole = trained("mxfp8")
    split = train(
        tmp_path / "split", "fp8_recipe=mxfp8", f"training.steps={STEPS}", "training.micro_batch_size=1"
    )
    assert split.losses == pytest.approx(whole.losses, rel=1e-2)
    for row, reference in zip(split.metrics[:5], whole.metrics[:5], strict=True):
        assert row["loss"] == pytest.approx(reference["loss"], rel=1e-3)
        assert row["grad_norm"] == pytest.approx(reference["grad_norm"], rel=2e-2)
        assert row["tokens"] == reference["tokens"]
