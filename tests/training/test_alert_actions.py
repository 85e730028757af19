"""An alert that stops a training job: the job ends in order, says why, and can go on."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.recipes import load
from nemo_fp8_recipes.telemetry import store
from nemo_fp8_recipes.telemetry.alerts.alert import Alert
from nemo_fp8_recipes.training.alert_actions import AlertActions, load_callback
from tests.training.command import train


def alert(action: str, rule: str = "mine") -> Alert:
    return Alert(3, rule, action, "text", "m", "input", 1.0, (("m", "input"),))


@pytest.mark.slow
def test_a_rule_that_stops_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_alerts.py").write_text(
        "def heard(alerts):\n    print('heard', *[alert.rule for alert in alerts])\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    rule = "{stat: amax, tensor: input, above: 0, action: stop, message: '{module} is at {value}'}"
    run = train(
        tmp_path / "run",
        "fp8_recipe=delayed",
        "training.steps=50",
        f"+alerts.custom.mine={rule}",
        "alerts.callback=my_alerts:heard",
    )
    assert run.record["status"] == "interrupted"
    # The values of step 1 arrive when step 2 begins, which is still run to its end.
    assert [row["step"] for row in run.metrics] == [1, 2]
    assert "Stopped after step 2 by the alert mine." in run.output
    assert re.search(r"^heard .*\bmine\b", run.output, re.MULTILINE)
    assert "Alert mine in step 1: decoder.layers." in run.output + run.errors
    assert (run.path / "checkpoints" / "step_000002").is_dir()
    assert "mine" in {alert.rule for alert in store.read_alerts(run.path)}
    # The report at the end of the run shows it too.
    assert "mine in step 1: decoder.layers." in run.output


def test_actions_are_taken_once() -> None:
    heard: list[tuple[Alert, ...]] = []
    actions = AlertActions(heard.append)
    actions((alert("warn"),))
    assert not actions.take_checkpoint()
    actions((alert("checkpoint"), alert("warn")))
    assert actions.take_checkpoint()
    assert not actions.take_checkpoint()
    assert actions.stop is None
    actions((alert("stop", "first"), alert("stop", "second")))
    assert actions.stop is not None
    assert actions.stop.rule == "first"
    assert len(heard) == 3


def test_what_a_callback_returns_is_done() -> None:
    returned: list[Any] = [None, "checkpoint", [load("mxfp8"), "checkpoint"], "stop"]
    actions = AlertActions(lambda _: returned.pop(0), switches=True)
    asked = []
    for _ in range(4):
        actions((alert("warn", "seen"),))
        asked.append((actions.take_checkpoint(), actions.take_recipe(), actions.stop and actions.stop.rule))
    assert asked == [
        (False, None, None),
        (True, None, None),
        (True, load("mxfp8"), None),
        (True, None, "seen"),
    ]


@pytest.mark.parametrize(("returned", "says"), [("stopp", "returned 'stopp'"), (load("bf16"), "recipe bf16")])
def test_what_cannot_be_done_is_refused(returned: Any, says: str) -> None:
    """A word that means nothing, and another recipe in a loop that has one."""
    with pytest.raises(ConfigError, match=says):
        AlertActions(lambda _: returned)((alert("warn"),))


@pytest.mark.parametrize("path", ["no_such_module:f", "json:no_such_function", "json", ""])
def test_a_callback_that_cannot_be_imported_is_named(path: str) -> None:
    with pytest.raises(ConfigError, match=r"alerts\.callback="):
        load_callback(path)


def test_a_callback_is_found() -> None:
    import json

    assert load_callback("json:dumps") is json.dumps
    assert load_callback(None) is None
