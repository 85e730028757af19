"""`trainer.fit` with each recipe: what was computed, with which object, the losses, what was logged."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nemo_fp8_recipes.emulation import trace
from nemo_fp8_recipes.injection import Manifest
from nemo_fp8_recipes.telemetry import store

RECIPES = ("delayed", "tensorwise", "mxfp8", "blockwise")
OPTIONS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "delayed": {"amax_history_len": 16},
    "tensorwise": {"num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 1},
    "mxfp8": {"fp8_format": "hybrid"},
    "blockwise": {"fp8_quant_fwd_inp": {"amax_epsilon": 1e-6}},
}
QUANTISED_LAYERS = {"bf16": 0, "delayed": 4, "tensorwise": 2, "mxfp8": 4, "blockwise": 4}
GRADIENT = {"delayed": "e5m2", "tensorwise": "e5m2", "mxfp8": "e5m2", "blockwise": "e4m3"}


@dataclass
class Result:
    losses: list[float]
    gemms: list[Any]
    te_recipes: list[Any]
    manifest: Manifest
    run_dir: Path


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    from tests.frameworks.nemo import jobs

    found = {}
    for recipe, options in OPTIONS.items():
        jobs.clean()
        run_dir = tmp_path_factory.mktemp(recipe)
        job = jobs.job(recipe, run_dir, options=options)
        with trace() as observed:
            losses = job.fit()
        found[recipe] = Result(
            losses, list(observed.gemms), job.seen.te_recipes, job.callbacks[0].manifest, run_dir
        )
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_gemm_of_a_quantised_layer_is_fp8(results: dict[str, Result], recipe: str) -> None:
    from tests.frameworks.nemo.jobs import LINEARS, STEPS

    micro_batches = 2
    quantised = [gemm for gemm in results[recipe].gemms if gemm.quantized]
    each = QUANTISED_LAYERS[recipe] * LINEARS * micro_batches * STEPS
    assert Counter(gemm.layout for gemm in quantised) == {"TN": each, "NN": each, "NT": each}
    gradient = GRADIENT[recipe]
    for gemm in quantised:
        wanted = ("e4m3", "e4m3") if gemm.layout == "TN" else ("e4m3", gradient)
        assert (gemm.a.format, gemm.b.format) == wanted


def test_bf16_has_no_fp8_gemm(results: dict[str, Result]) -> None:
    assert results["bf16"].gemms
    assert not any(gemm.quantized for gemm in results["bf16"].gemms)
    assert not results["bf16"].te_recipes


@pytest.mark.parametrize(
    ("recipe", "name", "options"),
    [
        ("delayed", "DelayedScaling", {"amax_history_len": 16, "amax_compute_algo": "max"}),
        ("tensorwise", "Float8CurrentScaling", {}),
        ("mxfp8", "MXFP8BlockScaling", {}),
        ("blockwise", "Float8BlockScaling", {}),
    ],
)
def test_the_object_in_force_is_the_recipes(
    results: dict[str, Result], recipe: str, name: str, options: dict[str, Any]
) -> None:
    objects = results[recipe].te_recipes
    assert objects
    assert {type(found).__name__.replace("TEDelayedScaling", "DelayedScaling") for found in objects} == {name}
    for found in objects:
        assert found.fp8_format.name == ("E4M3" if recipe == "blockwise" else "HYBRID")
        for option, value in options.items():
            assert getattr(found, option) == value
        if recipe == "blockwise":
            assert found.fp8_quant_fwd_inp.amax_epsilon == 1e-6


@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_differ_from_bf16_and_stay_close(results: dict[str, Result], recipe: str) -> None:
    from tests.frameworks.nemo.jobs import STEPS

    baseline, found = results["bf16"].losses, results[recipe].losses
    assert len(baseline) == len(found) == STEPS
    assert all(ours != theirs for ours, theirs in zip(found, baseline, strict=True))
    assert found == pytest.approx(baseline, rel=0.02)


@pytest.mark.parametrize("recipe", RECIPES)
def test_manifest_and_telemetry_know_every_quantised_module(results: dict[str, Result], recipe: str) -> None:
    from tests.frameworks.nemo.jobs import LINEARS, STEPS

    result = results[recipe]
    quantised = {row.module for row in result.manifest.quantized()}
    assert len(quantised) == QUANTISED_LAYERS[recipe] * LINEARS
    written = json.loads((result.run_dir / "manifest.json").read_text())
    assert Manifest.from_dict(written) == result.manifest
    rows = store.read(result.run_dir).to_pylist()
    logged = {(row["module"], row["tensor"], row["step"]) for row in rows}
    assert logged == {
        (module, tensor, step)
        for module in quantised
        for tensor in ("input", "weight", "grad_output")
        for step in range(1, STEPS + 1)
    }
    metrics = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in metrics] == pytest.approx(result.losses)
    assert all(row["learning_rate"] == pytest.approx(1e-3) and row["grad_norm"] > 0 for row in metrics)


def test_the_trainers_own_loggers_get_what_the_store_has(tmp_path: Path) -> None:
    from tests.frameworks.nemo import jobs

    logger = jobs.Written()
    job = jobs.job("delayed", tmp_path, steps=2, trainer_options={"logger": [logger]})
    job.fit()
    (logger,) = job.trainer.loggers  # NeMo copies its arguments
    told = {
        (step, tag, value)
        for step, metrics in logger.rows
        for tag, value in metrics.items()
        if tag.startswith("fp8/")
    }
    rows = store.read(tmp_path).to_pylist()
    stored = {
        (row["step"], f"fp8/{row['module']}/{row['tensor']}/{row['stat']}", row["value"]) for row in rows
    }
    assert {step for step, _, _ in told} == {1, 2}
    assert {tag.rsplit("/", 1)[1] for _, tag, _ in told} >= {"amax", "scale"}
    assert told <= stored
