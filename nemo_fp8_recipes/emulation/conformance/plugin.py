"""The pytest plugin that runs somebody else's tests on the emulated device and notes what became of each.

    pytest -p nemo_fp8_recipes.emulation.conformance.plugin --emulated-device b200 --outcomes FILE …

The device is installed before the first conftest or test module is imported. With `--sample N` at most N
tests are run, spread evenly over the parameters of every test function.
"""

from __future__ import annotations

import json
import math
import re
import signal
from collections.abc import Generator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

__all__ = ["spread"]

_RANK_ERROR = re.compile(r"^(?:\[rank\d+\]: )?\w+(?:Error|Exception): .*", re.MULTILINE)
"""How torchrun passes on what ended a rank."""

_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
"""Its multiples, modulo 1, lie as evenly as any that can be taken one after the other."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("emulated device")
    group.addoption("--emulated-device", default="b200", help="GPU to pose as")
    group.addoption("--emulated-devices", type=int, default=1, help="how many tests are told of")
    group.addoption("--outcomes", help="append one JSON object a test here; run no test that is in it")
    group.addoption("--sample", type=int, default=0, help="run at most this many tests; 0: all")
    group.addoption("--test-seconds", type=int, default=300, help="a test that takes longer fails")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    from nemo_fp8_recipes.emulation import install

    options = early_config.known_args_namespace
    install(options.emulated_device)
    if options.emulated_devices > 1:
        import torch

        # A test that starts torchrun asks this for the number of processes; each of them has one device.
        torch.cuda.device_count = lambda: options.emulated_devices


def spread(items: Sequence[Any], wanted: int) -> list[Any]:
    """At most `wanted` of the items, evenly spread, in order; at least one of each test function as long as
    there are not more functions than that.

    A function's tests are cut into runs of equal length, and one is taken of each run. At another place of
    every run: a fixed stride that divides the number of values of an inner parameter would never leave the
    first of them.
    """
    if wanted <= 0 or len(items) <= wanted:
        return list(items)
    functions: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        functions.setdefault(item.nodeid.split("[")[0], []).append(index)
    chosen: list[int] = []
    left = wanted
    # The smallest first: what they do not need goes to the others.
    by_size = sorted(functions.values(), key=len)
    for number, indices in enumerate(by_size):
        share = min(len(indices), max(1, left // (len(by_size) - number)))
        share = min(share, left)
        for run in range(share):
            first, end = run * len(indices) // share, (run + 1) * len(indices) // share
            chosen.append(indices[first + int(run * _GOLDEN_RATIO % 1 * (end - first))])
        left -= share
    return [items[index] for index in sorted(chosen)]


@pytest.hookimpl(trylast=True)  # of what -k leaves
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = spread(items, config.getoption("--sample"))
    done = _noted(config)
    _note(config, {"collected": len(items), "run": len(kept)})
    items[:] = [item for item in kept if item.nodeid not in done]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    seconds = item.config.getoption("--test-seconds")

    def out_of_time(_signal: int, _frame: FrameType | None) -> None:
        pytest.fail(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Generator[None, Any, None]:
    outcome = yield
    report: pytest.TestReport = outcome.get_result()
    if report.when != "call" and report.passed:
        return
    message, where = "", []
    if report.skipped:
        found = report.longrepr
        message = str(found[2] if isinstance(found, tuple) else found)
    elif report.failed and call.excinfo is None:
        message = str(report.longrepr)  # a test that was expected to fail, and passed
    elif report.failed and call.excinfo is not None:
        message = f"{call.excinfo.typename}: {call.excinfo.value}"[:400]
        # Before the command that failed, whose paths may be long. Each once: what one rank says may be of
        # another's end.
        of_ranks = dict.fromkeys(_RANK_ERROR.findall(report.capstderr))
        message = " ".join([*list(of_ranks)[:3], message])
        where = [f"{Path(str(entry.path)).name}:{entry.lineno + 1}" for entry in call.excinfo.traceback][-6:]
    _note(
        item.config,
        {
            "id": item.nodeid,
            "outcome": report.outcome,
            "message": message[:1000],
            "where": where,
            "seconds": round(report.duration, 2),
        },
    )


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _failed_collections.append(str(report.longrepr)[-600:])


def pytest_sessionfinish(session: pytest.Session) -> None:
    for message in _failed_collections:
        _note(session.config, {"id": "(collection)", "outcome": "failed", "message": message, "where": []})


_failed_collections: list[str] = []


def _noted(config: pytest.Config) -> set[str]:
    """The tests that an earlier run, which was stopped, has told of."""
    path = config.getoption("--outcomes")
    if not path or not Path(path).exists():
        return set()
    entries = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return {entry["id"] for entry in entries if "id" in entry}


def _note(config: pytest.Config, entry: dict[str, Any]) -> None:
    path = config.getoption("--outcomes")
    if path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
