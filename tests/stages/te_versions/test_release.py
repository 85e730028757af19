"""The release under test is the one in front of the installed one, and the binding is its."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.te_release import RELEASE

pytestmark = pytest.mark.usefixtures("emulated")


def test_the_release_is_the_one_that_was_asked_for() -> None:
    import importlib.metadata

    import transformer_engine

    from nemo_fp8_recipes.emulation.binding import releases

    installed = importlib.metadata.version("transformer-engine")
    assert installed == os.environ.get("NEMO_FP8_TE_VERSION", installed)
    assert releases.release().name == RELEASE
    assert (
        Path(transformer_engine.__file__).parent.parent / f"transformer_engine-{installed}.dist-info"
    ).is_dir()


def test_the_patch_release_is_the_one_that_is_documented() -> None:
    import importlib.metadata

    from nemo_fp8_recipes.emulation.binding.releases import RELEASES

    assert importlib.metadata.version("transformer-engine") == RELEASES[RELEASE].patch
