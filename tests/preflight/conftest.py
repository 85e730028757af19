"""The long comparison with the real stack runs only when it is asked for."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "preflight: hundreds of random jobs on the real stack; a stage of its own, -m preflight"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "preflight" in config.getoption("markexpr"):
        return
    for item in items:
        if item.get_closest_marker("preflight"):
            item.add_marker(pytest.mark.skip(reason="a stage of its own: make test-preflight"))
