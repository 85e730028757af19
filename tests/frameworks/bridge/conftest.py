"""Megatron-Bridge's real `pretrain()` under emulation, run by `make test-bridge` in its own environment.

Importing Bridge takes ten seconds, so the jobs of a test module run one after the other in the pytest
process, which poses as a B200: all recipes run on it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _device() -> None:
    from nemo_fp8_recipes import emulation

    emulation.install("b200")


@pytest.fixture(autouse=True)
def _no_run_left_behind() -> Iterator[None]:
    yield
    from nemo_fp8_recipes.callbacks.bridge import active

    active.end()
