"""The HTML report in a real browser. A stage of its own: `make test-browser`."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_fp8_recipes import cli
from nemo_fp8_recipes.telemetry.alerts.alert import Alert
from tests.report.runs import make

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: make test-browser")

DRIVER = shutil.which("chromedriver")
SWITCHES = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,1600",
)

ALERT = Alert(
    step=10,
    rule="saturation",
    action="warn",
    message="<b>look</b>",
    module="decoder.layers.0.mlp.linear_fc1",
    tensor="input",
    value=math.inf,
    tensors=(("decoder.layers.0.mlp.linear_fc1", "input"), ("decoder.layers.1.mlp.linear_fc1", "input")),
)

pytestmark = pytest.mark.skipif(DRIVER is None, reason="there is no chromedriver here: make test-browser")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for switch in SWITCHES:
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def opened(browser: Any, page: Path) -> None:
    browser.get(page.as_uri())
    until(lambda: browser.execute_script("return document.documentElement.dataset.ready") == "true")


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the page never came to be as expected"
        time.sleep(0.1)


def rows(browser: Any) -> list[str]:
    return browser.execute_script("return document.getElementById('heatmap').data[0].y")


def choose(browser: Any, control: str, value: str, event: str = "change") -> None:
    browser.execute_script(
        "const node = document.getElementById(arguments[0]); node.value = arguments[1];"
        "node.dispatchEvent(new Event(arguments[2]))",
        control,
        value,
        event,
    )


def test_it_draws_what_the_store_holds_and_answers_its_controls(browser: Any, tmp_path: Path) -> None:
    run = make(tmp_path / "run", layers=3)
    (run / "telemetry" / "alerts.jsonl").write_text(json.dumps(ALERT.to_dict()) + "\n")
    assert cli.main(["report", "--html", str(run)]) == 0
    opened(browser, run / "report.html")

    body = browser.find_element("tag name", "body").text
    assert "emulated h100" in body
    assert "nothing here says how fast" in body
    assert len(rows(browser)) == 9
    (cells,) = browser.execute_script(
        "return [...document.querySelectorAll('table.alerts tbody tr')]"
        ".map(row => [...row.cells].map(cell => cell.textContent))"
    )
    assert cells == ["10", "saturation", "decoder.layers.0.mlp.linear_fc1 input and 1 more", "<b>look</b>"]
    z = browser.execute_script("return document.getElementById('heatmap').data[0].z[0]")
    assert z == pytest.approx([1.0, 2.0, 4.0])  # amax 2, 4, 16 as powers of two
    assert browser.execute_script("return document.getElementById('loss').data[0].y.length") == 20
    assert browser.execute_script("return document.getElementById('window').data[0].y") == [0, 16]

    choose(browser, "tensor", "weight")
    assert [row.split()[-1] for row in rows(browser)] == ["weight"] * 3
    choose(browser, "filter", "layers.2.", "input")
    assert rows(browser) == ["decoder.layers.2.mlp.linear_fc1  weight"]
    shown = "return document.getElementById('detail').dataset.operand"
    assert browser.execute_script(shown) == "decoder.layers.2.mlp.linear_fc1 weight"
    choose(browser, "filter", "nothing has this name", "input")
    assert "No module's name has this in it" in browser.find_element("id", "stat-title").text
    choose(browser, "filter", "", "input")
    choose(browser, "tensor", "")
    browser.execute_script(
        "document.getElementById('heatmap').emit('plotly_click', {points: [{pointIndex: [5, 0]}]})"
    )
    assert browser.execute_script(shown) == "decoder.layers.1.mlp.linear_fc1 grad_output"
    assert errors(browser) == []


def test_runs_side_by_side_and_hostile_text(browser: Any, tmp_path: Path) -> None:
    names = ("delayed", "mxfp8", "<img src=x onerror=document.title='broken'>")
    runs = [
        make(tmp_path / name, recipe=name if "<" not in name else "bf16", telemetry="<" not in name)
        for name in names
    ]
    out = tmp_path / "all.html"
    assert cli.main(["report", f"--html={out}", *map(str, runs)]) == 0
    opened(browser, out)
    assert browser.execute_script("return document.getElementById('loss').data.length") == 3
    choose(browser, "run", "1")
    assert len(rows(browser)) == 6
    statistic = browser.execute_script("return document.getElementById('stat').value")
    assert statistic == "amax_bound"
    assert browser.title.startswith("FP8 report: ")
    assert not browser.find_elements("tag name", "img")
    assert errors(browser) == []


def errors(browser: Any) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
