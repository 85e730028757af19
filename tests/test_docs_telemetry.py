"""The Python in docs/telemetry.md runs as it stands, on a run directory."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from nemo_fp8_recipes.recipes import load
from nemo_fp8_recipes.telemetry.alerts.alert import Alert
from nemo_fp8_recipes.telemetry.store.alerts import AlertLog
from nemo_fp8_recipes.training.alert_actions import AlertActions
from tests.report.runs import make

DOCUMENT = Path(__file__).parents[1] / "docs" / "telemetry.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_the_snippet_runs(code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needed = re.match(r"# needs (\w+)\n", code)
    if needed and importlib.util.find_spec(needed[1]) is None:
        pytest.skip(f"{needed[1]} is not installed")
    make(tmp_path)
    alert = Alert(10, "saturation", "warn", "clipped", "m", "input", 4.0, (("m", "input"),))
    AlertLog(tmp_path).append([alert, dataclasses.replace(alert, step=20)])
    names: dict[str, Any] = {"RUN": str(tmp_path)}
    exec(compile(code, str(DOCUMENT), "exec"), names)
    if "heard" in names:  # the callback, which says what to do by what it returns
        actions = AlertActions(names["heard"], switches=True)
        actions((dataclasses.replace(alert, rule="underflow"),))
        assert (actions.take_checkpoint(), actions.take_recipe()) == (False, None)
        actions((alert,))
        assert (actions.take_checkpoint(), actions.take_recipe()) == (True, load("tensorwise"))
    else:
        assert capsys.readouterr().out


def test_there_are_snippets() -> None:
    assert len(BLOCKS) == 5
