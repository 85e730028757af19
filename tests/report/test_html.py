"""The HTML report: what it holds, and that nothing in a run directory breaks out of it."""

from __future__ import annotations

import base64
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_fp8_recipes import cli
from nemo_fp8_recipes.report.html.data import matrices
from nemo_fp8_recipes.telemetry import store
from nemo_fp8_recipes.telemetry.series import Series, StepValues
from nemo_fp8_recipes.telemetry.store import StoreWriter
from tests.report.runs import AMAX, SCALE, STEPS, make

FC1 = "decoder.layers.{}.mlp.linear_fc1"


def embedded(page: Path) -> dict[str, Any]:
    """The data in a page, found as a browser finds it: up to the first end of a script element."""
    text = page.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found.group(1))


def decoded(run: dict[str, Any], stat: str) -> np.ndarray:
    numbers = np.frombuffer(base64.b64decode(run["stats"][stat]["data"]), dtype="<f4")
    return numbers.reshape(len(run["operands"]), len(run["steps"]))


def test_the_page_holds_every_value_of_the_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path / "run", layers=12)
    assert cli.main(["report", "--html", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    (data,) = embedded(run / "report.html")["runs"]
    assert data["steps"] == list(STEPS)
    assert data["device"] == "emulated h100"
    assert [(one["module"], one["tensor"]) for one in data["operands"]] == [
        (FC1.format(layer), tensor) for layer in range(12) for tensor in AMAX
    ]
    for row, operand in enumerate(data["operands"]):
        tensor = operand["tensor"]
        assert decoded(data, "amax")[row].tolist() == np.float32(AMAX[tensor]).tolist()
        assert decoded(data, "scale")[row].tolist() == np.float32(SCALE[tensor]).tolist()
        largest = 57344 if tensor == "grad_output" else 448
        for found, amax, scale in zip(
            decoded(data, "headroom")[row], AMAX[tensor], SCALE[tensor], strict=True
        ):
            assert found == pytest.approx(largest / (amax * scale), rel=1e-5)
        assert data["windows"][str(row)] == [0.0, pytest.approx(AMAX[tensor][-1])]
    assert data["loss"]["values"][0] == pytest.approx(5.0)


def test_runs_side_by_side_go_where_the_user_says(tmp_path: Path) -> None:
    runs = [make(tmp_path / name, recipe=name) for name in ("delayed", "mxfp8")]
    out = tmp_path / "compared.html"
    assert cli.main(["report", f"--html={out}", *map(str, runs)]) == 0
    assert [run["name"] for run in embedded(out)["runs"]] == ["delayed", "mxfp8"]
    assert not (runs[0] / "report.html").exists()


def test_text_from_a_run_cannot_leave_its_place(tmp_path: Path) -> None:
    hostile = "</script><script>alert(1)</script><!-- plotly --> & \u2028"
    run = make(tmp_path / "<b>run & co")
    record = json.loads((run / "run.json").read_text())
    record["recipe"]["name"] = hostile
    record["versions"] = {"torch": hostile}
    (run / "run.json").write_text(json.dumps(record))
    assert cli.main(["report", "--html", str(run)]) == 0
    text = (run / "report.html").read_text()
    assert "alert(1)</script>" not in text
    assert "<title>FP8 report: &lt;b&gt;run &amp; co</title>" in text
    (data,) = embedded(run / "report.html")["runs"]
    assert data["recipe"]["name"] == hostile
    assert data["versions"]["torch"] == hostile


def test_runs_with_little_to_show_are_shown(tmp_path: Path) -> None:
    run = make(tmp_path / "run", recipe="bf16", telemetry=False)
    (run / "metrics.jsonl").unlink()
    assert cli.main(["report", "--html", str(run)]) == 0
    (data,) = embedded(run / "report.html")["runs"]
    assert data["operands"] == []
    assert data["stats"] == {}
    assert data["loss"] == {"steps": [], "values": []}


def test_steps_that_share_a_column_show_the_worst_of_them(tmp_path: Path) -> None:
    amax, scale = (Series("fc1", "input", stat, "delayed", "e4m3") for stat in ("amax", "scale"))
    values = [
        StepValues(step, (amax, scale), np.float32([step % 7, 100 - step]), {}) for step in range(1, 10)
    ] + [StepValues(10, (amax,), np.float32([math.nan]), {})]
    StoreWriter(tmp_path, {}).write(values)
    found = matrices(store.read(tmp_path), max_columns=4)
    assert found.steps_a_column == 3
    assert found.steps == (3, 6, 9, 10)
    assert found.stats["amax"][0].tolist()[:3] == [3.0, 6.0, 2.0]
    assert math.isnan(found.stats["amax"][0][3])
    assert found.stats["scale"][0].tolist()[:3] == [97.0, 94.0, 91.0]


def test_what_another_recipe_would_do_does_not_name_the_recipe_of_a_tensor(tmp_path: Path) -> None:
    own = Series("fc1", "input", "amax", "mxfp8", "e4m3")
    asked = Series("fc1", "input", "whatif/nvfp4/sqnr", "nvfp4", "e2m1")
    StoreWriter(tmp_path, {}).write([StepValues(1, (own, asked), np.float32([2, 20]), {})])
    found = matrices(store.read(tmp_path))
    assert (found.recipes, found.formats) == (("mxfp8",), ("e4m3",))
    assert set(found.stats) == {"amax", "whatif/nvfp4/sqnr"}


def test_without_plotly_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "plotly"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly", None)
    run = make(tmp_path / "run")
    assert cli.main(["report", "--html", str(run)]) == 2
    assert "pip install 'nemo-fp8-recipes[report]'" in capsys.readouterr().err
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--html", "--json", "RUN"], "Give --json or --html, not both"),
        (["--html"], "0 were given"),
        (["--json=x", "RUN"], "--json takes no value"),
        (["--html=/nowhere/at/all.html", "RUN"], "Cannot write /nowhere/at/all.html"),
    ],
)
def test_bad_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    run = make(tmp_path / "run")
    assert cli.main(["report", *(str(run) if word == "RUN" else word for word in arguments)]) == 2
    assert said in capsys.readouterr().err
