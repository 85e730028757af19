"""The table of GPUs to pose as."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemo_fp8_recipes.emulation.devices import DEVICES, device
from nemo_fp8_recipes.errors import EmulationError
from tests.support.processes import run_python

CONF = Path(__file__).resolve().parents[2] / "conf" / "hardware"


def test_the_configuration_names_the_same_gpus_with_the_same_facts() -> None:
    nodes = {path.stem: OmegaConf.load(path) for path in CONF.glob("*.yaml") if path.stem != "auto"}
    assert set(nodes) == set(DEVICES)
    for name, node in nodes.items():
        assert tuple(node.compute_capability) == DEVICES[name].compute_capability, name
        assert node.memory_gb == DEVICES[name].memory_gb, name
        assert node.display_name == DEVICES[name].display_name, name


def test_an_unknown_gpu_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(EmulationError, match="Did you mean h100") as caught:
        device("h10")
    assert caught.value.key == "hardware"
    assert caught.value.allowed == tuple(DEVICES)


def test_properties_say_that_they_are_emulated() -> None:
    properties = device("b200").properties
    assert (properties.major, properties.minor) == (10, 0)
    assert properties.multi_processor_count == 148
    assert "emulated" in properties.name
    assert properties.gcnArchName == properties.name  # CUDA builds of torch give the name here


def test_the_table_and_the_switch_need_no_torch() -> None:
    run_python(
        """
        import os, sys
        from nemo_fp8_recipes import emulation
        assert emulation.DEVICES["h200"].label == "emulated h200"
        emulation.should_start("emulated", {})
        assert emulation.active() is None
        assert "torch" not in sys.modules, "torch was imported"
        """
    )
