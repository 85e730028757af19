"""The stage of `make test-nemo`: NeMo's real trainer, in the environment of requirements/nemo.txt.

One process poses as a B200, on which every recipe runs, and imports NeMo once.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nemo_fp8_recipes.training.frameworks import FRAMEWORKS


@pytest.fixture(scope="session", autouse=True)
def nemo(emulated: object) -> None:
    FRAMEWORKS["nemo"].require_installed()


@pytest.fixture(autouse=True)
def _clean_process() -> Iterator[None]:
    from tests.frameworks.nemo import jobs

    jobs.clean()
    yield
    jobs.clean()
