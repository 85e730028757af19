"""The emulated device for the tests of the binding, and posing as another architecture for one test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch

from nemo_fp8_recipes.emulation import EmulatedDevice
from nemo_fp8_recipes.emulation.binding import device as binding_device
from tests.emulation.binding.architecture import BLACKWELL, HOPPER, Architecture


@pytest.fixture(scope="session")
def te(emulated: EmulatedDevice) -> ModuleType:
    """transformer_engine.pytorch on the emulated device."""
    import transformer_engine.pytorch as te
    import transformer_engine_torch

    if not hasattr(te, "DType"):  # before 2.17, whose quantizers take the binding's own
        te.DType = transformer_engine_torch.DType
    return te


@pytest.fixture(scope="session")
def tex(te: ModuleType) -> ModuleType:
    """The emulated binding."""
    import transformer_engine_torch

    return transformer_engine_torch


@pytest.fixture
def pose(te: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[tuple[int, int]], None]]:
    """Pose as an architecture for one test, in the binding and in what TE's Python asks torch.cuda."""
    from transformer_engine.pytorch import quantization, utils

    cached = [utils._get_device_compute_capability, utils.is_non_tn_fp8_gemm_supported]
    for check in ("check_fp8_support", "check_mxfp8_support", "check_fp8_block_scaling_support"):
        if hasattr(getattr(quantization, check), "cache_clear"):  # up to 2.14; flags since
            cached.append(getattr(quantization, check))

    def clear() -> None:
        for function in cached:
            function.cache_clear()

    def as_architecture(capability: tuple[int, int]) -> None:
        real = torch.cuda.get_device_properties()

        class Properties:
            major, minor = capability

            def __getattr__(self, name: str) -> object:
                return getattr(real, name)

        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: Properties())
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        for flag in ("_FP8_SUPPORT", "_MXFP8_SUPPORT", "_FP8_BLOCK_SCALING_SUPPORT"):
            if hasattr(quantization, flag):
                monkeypatch.setattr(quantization, flag, None)
        monkeypatch.setattr(binding_device, "_device", Architecture(capability))
        clear()

    yield as_architecture
    monkeypatch.undo()
    clear()


@pytest.fixture
def hopper(pose: Callable[[tuple[int, int]], None]) -> None:
    pose(HOPPER)


@pytest.fixture
def blackwell(pose: Callable[[tuple[int, int]], None]) -> None:
    pose(BLACKWELL)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1234)
