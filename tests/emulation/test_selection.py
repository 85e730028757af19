"""When emulation starts by itself, when it must be asked for, and when it is an error."""

from __future__ import annotations

import pytest

from nemo_fp8_recipes.emulation import selection as module
from nemo_fp8_recipes.emulation.selection import NativeDevice, check_hardware, should_start
from nemo_fp8_recipes.errors import EmulationError

LOCAL: dict[str, str] = {}
TORCHRUN = {"WORLD_SIZE": "2", "RANK": "0", "TORCHELASTIC_RUN_ID": "none"}
SLURM = {"SLURM_JOB_ID": "17"}
FILES = ["/dev/nvidia0", "/dev/nvidiactl"]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """machine(files, cuda): a machine with these device files, where torch can or cannot use CUDA."""

    def be(files: list[str], *, cuda: bool) -> None:
        monkeypatch.setattr(module, "nvidia_device_files", lambda: files)
        monkeypatch.setattr(module, "_cuda_works", lambda: cuda)

    return be


@pytest.mark.parametrize("setting", ["auto", "emulated"])
def test_a_single_local_process_without_a_device_emulates(machine, setting: str) -> None:
    machine([], cuda=False)
    assert should_start(setting, LOCAL) is True


@pytest.mark.parametrize(("environ", "name"), [(TORCHRUN, "torchrun"), (SLURM, "SLURM")])
def test_under_a_launcher_it_must_be_asked_for(machine, environ: dict[str, str], name: str) -> None:
    machine([], cuda=False)
    with pytest.raises(EmulationError, match=rf"started by {name}.*set device=emulated"):
        should_start("auto", environ)
    assert should_start("emulated", environ) is True


@pytest.mark.parametrize("setting", ["auto", "native"])
@pytest.mark.parametrize("environ", [LOCAL, TORCHRUN])
def test_a_broken_driver_is_an_error_never_a_fallback(machine, setting: str, environ: dict[str, str]) -> None:
    machine(FILES, cuda=False)
    with pytest.raises(EmulationError, match=r"/dev/nvidia0.*torch cannot use it"):
        should_start(setting, environ)


def test_a_broken_driver_can_be_emulated_around_on_purpose(machine) -> None:
    machine(FILES, cuda=False)
    assert should_start("emulated", LOCAL) is True


@pytest.mark.parametrize("setting", ["auto", "native"])
@pytest.mark.parametrize("environ", [LOCAL, TORCHRUN, SLURM])
def test_a_working_gpu_is_used(machine, setting: str, environ: dict[str, str]) -> None:
    machine(FILES, cuda=True)
    assert should_start(setting, environ) is False


def test_emulation_beside_a_working_gpu_is_an_error(machine) -> None:
    machine(FILES, cuda=True)
    with pytest.raises(EmulationError, match="whose GPU works") as caught:
        should_start("emulated", LOCAL)
    assert caught.value.key == "device"


def test_native_without_a_device_is_an_error(machine) -> None:
    machine([], cuda=False)
    with pytest.raises(EmulationError, match="needs an NVIDIA GPU"):
        should_start("native", LOCAL)


def test_an_unknown_setting_is_refused_with_the_nearest(machine) -> None:
    machine([], cuda=False)
    with pytest.raises(EmulationError, match="Did you mean emulated"):
        should_start("emulate", LOCAL)


FOUND = NativeDevice("NVIDIA H100 80GB HBM3", (9, 0))


@pytest.mark.parametrize("name", ["auto", "h100", "h200", "gh200"])
def test_hardware_that_matches_the_gpu_found_passes(name: str) -> None:
    check_hardware({"name": name}, FOUND)


@pytest.mark.parametrize("hardware", [{"name": "b200"}, {"name": "mine", "compute_capability": [10, 0]}])
def test_hardware_that_names_another_gpu_is_an_error(hardware: dict[str, object]) -> None:
    with pytest.raises(EmulationError, match=r"capability 10\.0.*NVIDIA H100 80GB HBM3 \(9\.0\)") as caught:
        check_hardware(hardware, FOUND)
    assert caught.value.allowed == ("auto", "h100", "h200", "gh200")


def test_a_native_run_reports_the_gpu_found_and_checks_it(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(FILES, cuda=True)
    monkeypatch.setattr(module, "_native", lambda: FOUND)
    assert module.switch("auto", {"name": "h100"}, LOCAL) == FOUND
    with pytest.raises(EmulationError):
        module.switch("auto", {"name": "b200"}, LOCAL)


@pytest.mark.parametrize(
    ("hardware", "posing"), [({"name": "auto"}, "h100"), ({"name": "b300"}, "b300"), ({}, "h100")]
)
def test_an_emulated_run_poses_as_the_hardware_named(
    machine, monkeypatch: pytest.MonkeyPatch, hardware: dict[str, object], posing: str
) -> None:
    from nemo_fp8_recipes.emulation import installation

    machine([], cuda=False)
    installed = []
    monkeypatch.setattr(installation, "install", installed.append)
    module.switch("auto", hardware, LOCAL)
    assert installed == [posing]
