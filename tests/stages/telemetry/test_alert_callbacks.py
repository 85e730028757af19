"""What a user's callback asks for is done by the real training job: a checkpoint, another recipe, the end."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from nemo_fp8_recipes.telemetry import store
from tests.training.command import Run, train

CALLBACK = """
import nemo_fp8_recipes

def heard(alerts):
    asked = {"seen": ["checkpoint", nemo_fp8_recipes.load("mxfp8")], "blocks": "stop"}
    print("heard", *[f"{alert.rule}@{alert.step}" for alert in alerts], flush=True)
    return next((asked[alert.rule] for alert in alerts if alert.rule in asked), None)
"""
RULES = (
    "+alerts.custom.seen={stat: scale_next, tensor: weight, above: 0, message: '-'}",
    "+alerts.custom.blocks={stat: scale_inv_max, tensor: weight, above: 0, message: '-'}",
    "alerts.callback=my_alerts:heard",
)
JOB = (
    "fp8_recipe=delayed",
    "fp8_recipe.amax_history_len=4",
    "hardware=b200",
    "training.steps=8",
    "training.save_every=100",
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`ran(path, *overrides, ...)`: a job whose alerts the callback hears."""
    modules = tmp_path_factory.mktemp("modules")
    (modules / "my_alerts.py").write_text(CALLBACK)
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", f"{modules}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    yield train
    patch.undo()


@pytest.fixture(scope="module")
def stopped(ran: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Step 1 makes delayed scaling's weights alert, whereupon step 2 trains in MXFP8 and is saved; its blocks
    alert when telemetry is flushed for that, and the job ends.
    """
    run: Run = ran(tmp_path_factory.mktemp("callback") / "run", *JOB, *RULES)
    return run


def recipes_by_step(run: Run) -> dict[int, set[str]]:
    rows = store.read(run.path, stat=["scale_next", "scale_inv_max"]).to_pylist()
    found: dict[int, set[str]] = {}
    for row in rows:
        found.setdefault(row["step"], set()).add(row["recipe"])
    return found


def test_the_job_does_what_the_callback_returns(stopped: Run) -> None:
    assert [line for line in stopped.output.splitlines() if line.startswith("heard")][:2] == [
        "heard seen@1",
        "heard blocks@2",
    ]
    assert recipes_by_step(stopped) == {1: {"delayed"}, 2: {"mxfp8"}}
    assert [row["step"] for row in stopped.metrics] == [1, 2]
    assert stopped.record["status"] == "interrupted"
    assert "Stopped after step 2 by the alert blocks." in stopped.output
    assert sorted(os.listdir(stopped.path / "checkpoints")) == ["step_000002"]


def test_the_manifest_is_read_again_after_the_change(stopped: Run) -> None:
    files = sorted((stopped.path / "manifests").iterdir())
    assert [file.name for file in files] == ["step_00000001.json", "step_00000002.json"]
    assert [json.loads(file.read_text())["asked"] for file in files] == ["delayed", "mxfp8"]
    assert json.loads((stopped.path / "manifest.json").read_text())["asked"] == "mxfp8"
    # The report at the end of the job says that there was another recipe.
    assert "Not shown: delayed quantised" in stopped.output


def test_a_job_goes_on_behind_the_change_where_the_schedule_says_so(stopped: Run, ran: Any) -> None:
    refused = ran(stopped.path, *JOB, resume=True, status=2)
    assert "was trained with the recipe mxfp8" in refused.errors
    assert "Where alerts.callback changed it, say in recipe_schedule from which step on." in refused.errors
    schedule = "recipe_schedule=[{recipe: mxfp8, from_step: 2}]"
    resumed = ran(stopped.path, *JOB, schedule, resume=True)
    assert resumed.record["status"] == "finished"
    assert recipes_by_step(resumed) == {1: {"delayed"}} | {step: {"mxfp8"} for step in range(2, 9)}


def test_ranks_hear_and_do_the_same(ran: Any, tmp_path: Path) -> None:
    run = ran(tmp_path / "run", *JOB, *RULES, "parallel.tp=2", ranks=2)
    assert run.record["status"] == "interrupted"
    assert recipes_by_step(run) == {1: {"delayed"}, 2: {"mxfp8"}}
    heard = [line for line in run.output.splitlines() if "heard" in line]
    assert len([line for line in heard if "seen@1" in line]) == 2
