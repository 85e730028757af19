"""The GPUs of this machine as NVIDIA's driver lists them: through NVML, else nvidia-smi. Imports no torch.

NVML (libnvidia-ml, which comes with the driver) is asked by ctypes: no CUDA context is created and no process
is started. Its names: nvml.h, "Device Queries" and "System Queries".
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from nemo_fp8_recipes.errors import PreflightError

__all__ = ["Gpu", "found"]

LIBRARY = "libnvidia-ml.so.1"
_QUERY = ("--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader,nounits")
_SECONDS = 60  # a GPU that does not answer for so long is broken
_NAME_BYTES = 96  # NVML_DEVICE_NAME_V2_BUFFER_SIZE


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: product name.
        compute_capability: major and minor.
        memory_gb: memory in units of 2^30 bytes, rounded; None where the driver does not say.
    """

    name: str
    compute_capability: tuple[int, int]
    memory_gb: int | None = None


def found(library: str | None = None) -> list[Gpu]:
    """The GPUs of this machine that CUDA_VISIBLE_DEVICES does not hide; none where there is no driver.

    Args:
        library: NVML's file; None: the driver's own.

    Raises:
        PreflightError: the driver is there and fails, hangs, or answers something else than GPUs.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return []
    try:
        nvml = ctypes.CDLL(library or LIBRARY)
    except OSError:
        return _from_nvidia_smi()  # no driver, or one that brings only the tool, as under WSL
    return list(_from_nvml(nvml))


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


@contextmanager
def _session(nvml: ctypes.CDLL) -> Iterator[None]:
    _require(nvml, nvml.nvmlInit_v2())
    try:
        yield
    finally:
        nvml.nvmlShutdown()


def _from_nvml(nvml: ctypes.CDLL) -> Iterator[Gpu]:
    with _session(nvml):
        count = ctypes.c_uint()
        _require(nvml, nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)))
        for index in range(count.value):
            handle = ctypes.c_void_p()
            _require(nvml, nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)))
            name = ctypes.create_string_buffer(_NAME_BYTES)
            _require(nvml, nvml.nvmlDeviceGetName(handle, name, ctypes.c_uint(_NAME_BYTES)))
            major, minor = ctypes.c_int(), ctypes.c_int()
            _require(
                nvml,
                nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor)),
            )
            memory = _Memory()
            # A GPU that shares the CPU's memory (GB10) has none of its own to report.
            known = nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == 0
            yield Gpu(
                name.value.decode(errors="replace"),
                (major.value, minor.value),
                round(memory.total / 2**30) if known else None,
            )


def _require(nvml: ctypes.CDLL, status: int) -> None:
    if status == 0:
        return
    nvml.nvmlErrorString.restype = ctypes.c_char_p
    said = nvml.nvmlErrorString(ctypes.c_int(status)) or b"unknown error"
    raise PreflightError(
        f"NVIDIA's driver fails on this machine: NVML error {status}, {said.decode(errors='replace')}.",
        hint="Check nvidia-smi; to check for another machine name its GPU, such as hardware=h100.",
    )


def _from_nvidia_smi() -> list[Gpu]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        done = subprocess.run([tool, *_QUERY], capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise PreflightError(
            f"nvidia-smi gave no answer in {_SECONDS} s.", hint="The GPU or its driver hangs."
        ) from None
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise PreflightError(
            f"nvidia-smi fails on this machine: {said[0] if said else f'exit status {done.returncode}'}.",
            hint="The GPU's driver does not work here.",
        )
    return [_read(line) for line in done.stdout.splitlines() if line.strip()]


def _read(line: str) -> Gpu:
    parts = [part.strip() for part in line.split(",")]
    try:
        name, capability, memory = parts
        major, minor = (int(part) for part in capability.split("."))
    except ValueError:
        raise PreflightError(f"nvidia-smi lists a GPU that cannot be read: {line!r}.") from None
    return Gpu(name, (major, minor), round(int(memory) / 1024) if memory.isdigit() else None)
