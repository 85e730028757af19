"""Whether this process runs on a GPU or on the emulated device: the one place where that is decided.

`device=native` means a GPU, `device=emulated` the emulated device. `device=auto` emulates only in a single
local process on a machine that has no NVIDIA device at all; a GPU node whose driver is broken is an error,
never a reason to emulate. No torch is imported where nothing but the machine has to be looked at.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_fp8_recipes.emulation.devices import DEVICES, EmulatedDevice, device
from nemo_fp8_recipes.errors import EmulationError, nearest

__all__ = ["NativeDevice", "check_hardware", "launcher", "nvidia_device_files", "should_start", "switch"]

SETTINGS = ("auto", "native", "emulated")

_DEVICE_FILES = ("/dev/nvidia[0-9]*", "/dev/nvidiactl", "/dev/dxg")
"""NVIDIA's Linux driver, its control device, and the GPU of Windows as WSL shows it."""

_LAUNCHERS = {
    "TORCHELASTIC_RUN_ID": "torchrun",
    "WORLD_SIZE": "torchrun",
    "SLURM_JOB_ID": "SLURM",
    "OMPI_COMM_WORLD_SIZE": "Open MPI",
    "PMI_SIZE": "MPI",
}


@dataclass(frozen=True)
class NativeDevice:
    """The GPU a job runs on.

    Attributes:
        label: its product name, as torch reports it: what every record says.
        compute_capability: (major, minor).
    """

    label: str
    compute_capability: tuple[int, int]
    emulated: bool = field(default=False, init=False)


def nvidia_device_files() -> list[str]:
    """The files by which a machine shows that it has an NVIDIA device."""
    return sorted(path for pattern in _DEVICE_FILES for path in glob.glob(pattern))


def launcher(environ: Mapping[str, str]) -> str | None:
    """What started this process as one of a job: "torchrun", "SLURM", …; None for a plain local process."""
    for variable, name in _LAUNCHERS.items():
        if environ.get(variable):
            return name
    return None


def should_start(device_setting: str, environ: Mapping[str, str]) -> bool:
    """Whether to emulate: True for the emulated device, False for a GPU.

    Args:
        device_setting: "auto", "native" or "emulated".
        environ: the process environment.

    Raises:
        EmulationError: an unknown setting; "emulated" where CUDA works; "auto" where emulation must be asked
        for or
            where the GPU cannot be used; "native" where it cannot be used.
    """
    if device_setting not in SETTINGS:
        close = nearest(device_setting, SETTINGS)
        raise EmulationError(
            f"device={device_setting!r} is not a device setting.",
            key="device",
            value=device_setting,
            allowed=SETTINGS,
            hint=f"Did you mean {close}?" if close else None,
        )
    files = nvidia_device_files()
    if device_setting == "emulated":
        if _cuda_works():
            raise EmulationError(
                "device=emulated on a machine whose GPU works: emulation is for machines without one.",
                key="device",
                value=device_setting,
                allowed=("auto", "native"),
                hint="To emulate here all the same, hide the GPUs with CUDA_VISIBLE_DEVICES= (empty).",
            )
        return True
    if _cuda_works():
        return False
    if files:
        raise EmulationError(
            f"This machine has an NVIDIA device ({files[0]}), but torch cannot use it.",
            key="device",
            value=device_setting,
            hint="Check nvidia-smi, CUDA_VISIBLE_DEVICES and that torch is a CUDA build; "
            "to emulate on purpose set device=emulated.",
        )
    if device_setting == "native":
        raise EmulationError(
            "device=native needs an NVIDIA GPU, and this machine shows none.",
            key="device",
            value=device_setting,
            allowed=("auto", "emulated"),
        )
    started_by = launcher(environ)
    if started_by is not None:
        raise EmulationError(
            f"This process was started by {started_by} on a machine with no NVIDIA device; emulation starts "
            "by itself only in a single local process.",
            key="device",
            value=device_setting,
            hint="To emulate here set device=emulated.",
        )
    return True


def switch(
    device_setting: str, hardware: Mapping[str, Any], environ: Mapping[str, str]
) -> EmulatedDevice | NativeDevice:
    """Decide, and install the emulated device where that is the decision.

    Args:
        device_setting: "auto", "native" or "emulated".
        hardware: the configuration node `hardware`; its `name` is the GPU to pose as, or to find. With "auto"
        the
            posing device is an h100 and any GPU will do.
        environ: the process environment.

    Returns:
        The device in place; its `label` goes into every record.

    Raises:
        EmulationError: see `should_start` and `check_hardware`; unknown names.
    """
    name = str(hardware.get("name") or "auto")
    if should_start(device_setting, environ):
        from nemo_fp8_recipes.emulation.installation import install

        return install("h100" if name == "auto" else name)
    found = _native()
    check_hardware(hardware, found)
    return found


def check_hardware(hardware: Mapping[str, Any], found: NativeDevice) -> None:
    """Check that the GPU found is the one that `hardware=` names. Raises `EmulationError` when it is not."""
    name = str(hardware.get("name") or "auto")
    if name == "auto":
        return
    asked = hardware.get("compute_capability")
    capability = tuple(asked) if asked else device(name).compute_capability
    if capability != found.compute_capability:
        major, minor = found.compute_capability
        raise EmulationError(
            f"hardware={name} has compute capability {capability[0]}.{capability[1]}, but the GPU found is "
            f"{found.label} ({major}.{minor}).",
            key="hardware",
            value=name,
            allowed=[
                "auto",
                *(d.name for d in DEVICES.values() if d.compute_capability == found.compute_capability),
            ],
        )


def _cuda_works() -> bool:
    """Whether torch can use a GPU. Without device files there is none to ask about, and torch is not
    imported.
    """
    if not nvidia_device_files():
        return False
    try:
        import torch
    except ImportError as error:
        raise EmulationError(
            f"This machine has an NVIDIA device, and PyTorch cannot be imported: {error}.",
            key="device",
            hint="Install a CUDA build of PyTorch (2.6 or later), Megatron-Core 0.15 or 0.16 and Transformer "
            "Engine, or work in a container that has them.",
        ) from error

    from nemo_fp8_recipes.emulation.installation import active

    return active() is None and torch.cuda.is_available()


def _native() -> NativeDevice:
    import torch

    return NativeDevice(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
