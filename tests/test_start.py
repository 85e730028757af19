"""`start`: recipe, preflight and device in the right order, where there seems to be a GPU and where not."""

from __future__ import annotations

import pytest

from nemo_fp8_recipes import emulation, preflight, recipes
from nemo_fp8_recipes.config import compose
from nemo_fp8_recipes.emulation import NativeDevice
from nemo_fp8_recipes.errors import ConfigError, EmulationError, PreflightError
from nemo_fp8_recipes.startup import start


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> NativeDevice:
    """A GPU node with an H100, as the switch reports it."""
    found = NativeDevice("NVIDIA H100 80GB HBM3", (9, 0))
    monkeypatch.setattr(emulation, "should_start", lambda *_: False)
    monkeypatch.setattr(emulation, "switch", lambda *_: found)
    return found


def test_the_gpu_that_is_found_decides_what_auto_means(h100: NativeDevice) -> None:
    with pytest.raises(PreflightError, match="mxfp8") as caught:
        start(compose(["fp8_recipe=mxfp8", "hardware=auto"]), {})
    assert "blockwise" in str(caught.value)


def test_a_recipe_that_the_gpu_runs_goes_on(h100: NativeDevice) -> None:
    job = start(compose(["fp8_recipe=blockwise", "hardware=auto"]), {})
    assert job.device is h100
    assert job.recipe.name == "blockwise"
    assert not [finding for finding in job.findings if finding.severity == "error"]


def test_preflight_comes_before_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the device was put in place although the job cannot run")

    monkeypatch.setattr(emulation, "should_start", lambda *_: True)
    monkeypatch.setattr(emulation, "switch", never)
    with pytest.raises(PreflightError):
        start(compose(["fp8_recipe=mxfp8", "hardware=h100"]), {})


@pytest.mark.parametrize(
    ("recipe", "posing"),
    [("delayed", "h100"), ("tensorwise", "h100"), ("blockwise", "h100"), ("mxfp8", "b200")],
)
def test_emulation_poses_as_a_device_that_runs_the_recipe(
    monkeypatch: pytest.MonkeyPatch, recipe: str, posing: str
) -> None:
    asked = []
    monkeypatch.setattr(emulation, "should_start", lambda *_: True)
    monkeypatch.setattr(emulation, "switch", lambda _, hardware, __: asked.append(hardware["name"]))
    start(compose([f"fp8_recipe={recipe}"]), {})
    assert asked == [posing]
    assert preflight.runs_on(recipe, emulation.DEVICES[posing].compute_capability)


def test_torchrun_on_a_machine_without_a_gpu_must_ask_for_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_fp8_recipes.emulation import selection

    monkeypatch.setattr(selection, "nvidia_device_files", list)
    with pytest.raises(EmulationError, match="device=emulated"):
        start(compose(["fp8_recipe=delayed"]), {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2"})


def test_a_recipe_alone_starts_without_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(emulation, "should_start", lambda *_: True)
    monkeypatch.setattr(emulation, "switch", lambda _, hardware, __: asked.append(hardware["name"]))
    recipe = recipes.load("mxfp8", fp8_format="hybrid")
    job = start(recipe)
    assert job.recipe == recipe
    assert asked == ["b200"]
    # The warning about this recipe is there, and nothing about the shapes of some model.
    assert "FP8-NUM-001" in {finding.code for finding in job.findings}
    assert not [finding for finding in job.findings if finding.code.startswith(("FP8-SHP", "FP8-PLC"))]


def test_a_recipe_alone_is_checked_against_the_gpu_found(h100: NativeDevice) -> None:
    with pytest.raises(PreflightError, match="mxfp8"):
        start(recipes.load("mxfp8"))


def test_a_configuration_names_the_device_itself() -> None:
    with pytest.raises(ConfigError, match="device=emulated"):
        start(compose(["fp8_recipe=delayed"]), device="emulated")


def test_no_submodule_hides_a_public_name() -> None:
    """`fp8.start` stays the function after its module was imported, by us or by anybody."""
    import importlib
    import pkgutil

    import nemo_fp8_recipes as fp8

    submodules = {module.name for module in pkgutil.iter_modules(fp8.__path__)}
    modules = {"emulation", "telemetry"}
    assert submodules & set(fp8.__all__) == modules
    importlib.import_module("nemo_fp8_recipes.training.job")
    assert fp8.start is start
