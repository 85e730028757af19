"""The default job of `nemo-fp8 train` and Megatron-Core itself under the installed release."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support.processes import environment, run_emulated
from tests.support.te_release import RELEASE

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8", "nvfp4")
FORMATS = {"nvfp4": "e2m1"}
STEPS = 2  # of each recipe


def test_the_default_job_trains_with_every_recipe_one_after_the_other(tmp_path: Path) -> None:
    spans = ", ".join(
        f"{{recipe: {recipe}, from_step: {number * STEPS + 1}, to_step: {(number + 1) * STEPS}}}"
        for number, recipe in enumerate(RECIPES)
    )
    steps = STEPS * len(RECIPES)
    run = tmp_path / "run"
    options = [f"recipe_schedule=[{spans}]", f"training.steps={steps}", f"run_dir={run}"]
    command = [
        sys.executable,
        "-m",
        "nemo_fp8_recipes",
        "train",
        "fp8_recipe=delayed",
        *options,
        "training.eval_batches=0",
    ]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr

    record = json.loads((run / "run.json").read_text())
    assert record["versions"]["transformer-engine"].startswith(f"{RELEASE}.")
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == steps
    assert losses[0] > 5.3  # ln 256 = 5.55: it starts knowing nothing
    assert losses[-1] < losses[0] - 0.3

    read = {}
    for file in (run / "manifests").glob("step_*.json"):
        rows = json.loads(file.read_text())["rows"]
        linears = [row for row in rows if row["module"].rpartition(".")[2].startswith("linear_")]
        assert linears
        assert all(row["quantized"] for row in linears)
        (recipe,) = {row["recipe"] for row in linears}
        read[recipe] = {(row["input"]["format"], row["weight"]["format"]) for row in linears}
    assert read == {recipe: {(FORMATS.get(recipe, "e4m3"),) * 2} for recipe in RECIPES}


def test_megatron_core_finds_the_release_and_multiplies_in_its_formats() -> None:
    """The ledger of a step of Megatron's own model: what was multiplied, not what was asked for."""
    seen = run_emulated(
        """
        from megatron.core import parallel_state
        from megatron.core.extensions.transformer_engine import HAVE_TE
        from megatron.core.utils import get_te_version
        from tests.support.gpt import Trainer

        found = {"have": HAVE_TE, "version": str(get_te_version())}
        for recipe in ("delayed", "tensorwise", "blockwise", "mxfp8"):
            trainer = Trainer(recipe=recipe)
            with emulation.trace() as trace:
                trainer.train(1)
            quantized = [gemm for gemm in trace.gemms if gemm.quantized]
            found[recipe] = sorted({(gemm.layout, gemm.a.format, gemm.b.format) for gemm in quantized})
            parallel_state.destroy_model_parallel()
        result(found)
        """,
        device="b200",
    )
    assert seen.pop("have") is True
    assert seen.pop("version").startswith(f"{RELEASE}.")
    hybrid = [["NN", "e4m3", "e5m2"], ["NT", "e4m3", "e5m2"], ["TN", "e4m3", "e4m3"]]
    e4m3 = [[layout, "e4m3", "e4m3"] for layout in ("NN", "NT", "TN")]
    assert seen == {"delayed": hybrid, "tensorwise": hybrid, "blockwise": e4m3, "mxfp8": e4m3}
