"""Device queries: one posing GPU, index 0, in every process; those of torchrun's others are counted."""

# ruff: noqa: ARG001, ARG002 -- the signatures are torch's

from __future__ import annotations

import os
from typing import Any

import torch

from nemo_fp8_recipes.emulation.devices import DeviceProperties, EmulatedDevice
from nemo_fp8_recipes.emulation.ledger import PatchLedger

__all__ = ["CUDA_VERSION", "apply"]

CUDA_VERSION = "12.9"
"""The oldest CUDA with every FP8 recipe; the emulated binding reports the cuBLASLt of the same release."""


def apply(ledger: PatchLedger, device: EmulatedDevice) -> None:
    """Stand in for the functions of `torch.cuda` that ask about devices."""
    properties = device.properties

    def is_available() -> bool:
        return True

    def is_initialized() -> bool:
        return True

    def init() -> None:
        return None

    def _lazy_init() -> None:
        return None

    def _lazy_call(callable: Any, **_kwargs: Any) -> None:
        # Real CUDA queues this until the device is initialised; the posing device always is.
        callable()

    def device_count() -> int:
        # As on a node where every process sees all GPUs: programs check that there is one for each of them.
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def current_device() -> int:
        return 0

    def set_device(device: Any) -> None:
        # Every process has its own posing device, so a local rank has no other one to choose.
        return None

    def get_device_name(device: Any = None) -> str:
        return properties.name

    def get_device_capability(device: Any = None) -> tuple[int, int]:
        return (properties.major, properties.minor)

    def get_device_properties(device: Any = None) -> DeviceProperties:
        return properties

    def get_arch_list() -> list[str]:
        return [f"sm_{properties.major}{properties.minor}"]

    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return True

    def can_device_access_peer(device: Any, peer_device: Any) -> bool:
        return False

    def _accelerator_getAccelerator() -> None:
        return None

    reason = "torch was built without CUDA, or finds no device"
    for function in (
        is_available,
        is_initialized,
        init,
        _lazy_init,
        _lazy_call,
        device_count,
        current_device,
        set_device,
        get_device_name,
        get_device_capability,
        get_device_properties,
        get_arch_list,
        is_bf16_supported,
        can_device_access_peer,
    ):
        ledger.set(torch.cuda, function.__name__, function, reason)
    ledger.set(torch.cuda, "device", _DeviceContext, "selecting the one posing device changes nothing")
    ledger.set(torch.cuda, "device_of", _DeviceContext, "selecting the one posing device changes nothing")
    ledger.set(
        torch._C,
        _accelerator_getAccelerator.__name__,
        _accelerator_getAccelerator,
        "torch.accelerator knows streams of a real device only: a torch built with CUDA has none either, as "
        "one built without",
    )
    ledger.set(torch.version, "cuda", CUDA_VERSION, "Transformer Engine's checks compare the CUDA version")


class _DeviceContext:
    """`torch.cuda.device(…)` where there is one device: a context that changes nothing."""

    def __init__(self, device: Any) -> None:
        self.idx = 0

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_exception: object) -> None:
        return None
