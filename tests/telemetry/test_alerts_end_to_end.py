"""Alerts in an emulated run: a jump and an Inf that really went through delayed scaling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_fp8_recipes.telemetry import store
from tests.support.processes import run_emulated

JUMP, INF, STEPS = 6, 12, 18


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The run directory, and what the callback saw and when."""
    path = tmp_path_factory.mktemp("alerts")
    seen = run_emulated(
        f"""
        import logging, torch
        import transformer_engine.pytorch as te
        import nemo_fp8_recipes
        from nemo_fp8_recipes import telemetry

        warnings = []
        handler = logging.Handler()
        handler.emit = lambda record: warnings.append(record.getMessage())
        logging.getLogger("nemo_fp8_recipes").addHandler(handler)
        recipe = nemo_fp8_recipes.load("delayed", amax_history_len=4)
        torch.manual_seed(0)
        model = torch.nn.Sequential(te.Linear(64, 64, bias=False), te.Linear(64, 64, bias=False))
        seen, now = [], 0
        recorder = telemetry.attach(
            model, recipe, directory={str(path)!r}, log_every=1, sinks=["parquet", "tensorboard", "jsonl"],
            on_alert=lambda alerts: seen.extend((now, alert.step, alert.rule) for alert in alerts),
        )
        for now in range(1, {STEPS} + 1):
            recorder.begin_step(now)
            x = torch.randn(32, 64) * (16 if now >= {JUMP} else 1)
            if now == {INF}:
                x[3, 5] = float("inf")
            with te.autocast(enabled=True, recipe=recipe.te()):
                model(x.requires_grad_()).sum().backward()
            model.zero_grad()
            recorder.end_step(now)
        recorder.close()
        result({{"seen": seen, "warnings": warnings}})
        """
    )
    return path, seen


def test_the_jump_and_the_inf_are_reported_in_their_steps(run: tuple[Path, Any]) -> None:
    found = {(alert.step, alert.rule): alert for alert in store.read_alerts(run[0])}
    jump = found[JUMP, "saturation"]
    assert ("0", "input") in jump.tensors
    assert ("0", "weight") not in jump.tensors
    frozen = found[INF, "history_frozen"]
    assert ("0", "input") in frozen.tensors
    assert (INF, "non_finite") in found
    assert {step for step, _ in found} == {JUMP, INF}


def test_the_scale_really_stood_still(run: tuple[Path, Any]) -> None:
    rows = store.read(run[0], "0", "input", "scale_next").to_pylist()
    scales = {row["step"]: row["value"] for row in rows}
    # The window holds four: the Inf is behind the scales of its own step and the three that follow.
    assert len({scales[step] for step in range(INF - 1, INF + 4)}) == 1
    assert scales[INF + 4] != scales[INF]


def test_the_callback_hears_of_it_before_the_next_step_runs(run: tuple[Path, Any]) -> None:
    steps = {(step, rule): now for now, step, rule in run[1]["seen"]}
    assert steps[JUMP, "saturation"] == JUMP + 1
    assert steps[INF, "history_frozen"] == INF + 1


def test_the_terminal_says_what_to_do(run: tuple[Path, Any]) -> None:
    said = [line for line in run[1]["warnings"] if line.startswith(f"Alert saturation in step {JUMP}: ")]
    assert len(said) == 1
    assert "raise fp8_recipe.margin" in said[0]
