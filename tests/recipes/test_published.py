"""Every model's sizes, parallelism and recipe, against the training configuration that they are copied from.

The packages' sources are read where they are unpacked (NEMO_FP8_PEER_SOURCES); `make test-presets` fetches
and unpacks them.
"""

import os
from pathlib import Path

import pytest

from nemo_fp8_recipes import config, recipes
from tests.recipes import factories
from tests.recipes.published import BRIDGE, NEMO, from_bridge, from_nemo


def root(package: str) -> Path:
    """Where the package's modules are; without it the test is skipped, or fails in its stage."""
    for directory in filter(None, os.environ.get(factories.DIRECTORIES, "").split(os.pathsep)):
        if (Path(directory) / factories.FILES[package]).is_file():
            return Path(directory)
    reason = f"{package} is not unpacked in {factories.DIRECTORIES}"
    if os.environ.get(factories.REQUIRED):
        pytest.fail(reason)
    pytest.skip(reason)


def ours(name: str, key: str):
    model = config.compose([f"model={name}"]).model
    node = model.published if key in ("tp", "pp", "cp", "ep", "sequence", "fp8_recipe") else model
    for part in key.split("."):
        node = node[part]
    return node


def compare(name: str, theirs: dict) -> None:
    precision = theirs.pop("fp8_recipe")
    assert recipes.resolve(precision).choice == ours(name, "fp8_recipe")
    assert {key: ours(name, key) for key in theirs} == theirs


@pytest.mark.parametrize("name", NEMO)
def test_as_nemo_trains_it(name):
    theirs = from_nemo(root("nemo_toolkit"), NEMO[name])
    assert len(theirs) == 10  # five sizes, four of parallelism, the precision
    compare(name, theirs)


@pytest.mark.parametrize("name", BRIDGE)
def test_as_bridge_trains_it(name):
    theirs = from_bridge(root("megatron-bridge"), BRIDGE[name])
    # the checkpoint's configuration has the sizes of Super; the recipe says how it is cut
    assert len(theirs) >= (6 if "super" in name else 14)
    compare(name, theirs)


def test_every_model_is_compared():
    assert {*NEMO, *BRIDGE, "nemotron_tiny"} == set(config.options("model"))
