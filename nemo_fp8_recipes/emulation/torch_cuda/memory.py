"""Memory of the posing device. Nothing is allocated there, so nothing is in use; its size is the data
sheet's. What is free is what the host can still give: a program that asks first gets no more than there is.
"""

# ruff: noqa: ARG001 -- the signatures are torch's

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nemo_fp8_recipes.emulation.devices import EmulatedDevice
from nemo_fp8_recipes.emulation.ledger import PatchLedger

__all__ = ["apply"]

_NOTHING_TO_DO = (
    "empty_cache",
    "ipc_collect",
    "reset_peak_memory_stats",
    "reset_max_memory_allocated",
    "reset_max_memory_cached",
    "reset_accumulated_memory_stats",
    "set_per_process_memory_fraction",
    "reset_accumulated_host_memory_stats",
    "reset_peak_host_memory_stats",
    "_record_memory_history",
    "_set_allocator_settings",
)
_NOTHING_IN_USE = (
    "memory_allocated",
    "max_memory_allocated",
    "memory_reserved",
    "max_memory_reserved",
    "utilization",
    "memory_usage",
)


def apply(ledger: PatchLedger, device: EmulatedDevice) -> None:
    """Stand in for the allocator's functions."""
    total = device.properties.total_memory
    reason = "there is no CUDA allocator"

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        return (min(total, _available(total)), total)

    def memory_stats(device: Any = None) -> dict[str, int]:
        return defaultdict(int)

    def memory_summary(device: Any = None, abbreviated: bool = False) -> str:
        return "The device is emulated: no device memory is in use."

    def memory_snapshot(*_args: Any, **_kwargs: Any) -> list[Any]:
        return []

    def _snapshot(device: Any = None, augment_with_fx_traces: bool = False) -> dict[str, list[Any]]:
        return {"segments": [], "device_traces": [[]]}

    def _dump_snapshot(filename: str = "dump_snapshot.pickle", augment_with_fx_traces: bool = False) -> None:
        Path(filename).write_bytes(pickle.dumps(_snapshot()))

    def get_per_process_memory_fraction(device: Any = None) -> float:
        return 1.0

    def get_allocator_backend() -> str:
        return "native"

    @contextmanager
    def use_mem_pool(pool: Any, device: Any = None) -> Iterator[None]:
        yield

    for function in (
        mem_get_info,
        memory_stats,
        memory_summary,
        memory_snapshot,
        get_per_process_memory_fraction,
        get_allocator_backend,
        use_mem_pool,
    ):
        _everywhere(ledger, function.__name__, function, reason)
    for private in (_snapshot, _dump_snapshot):
        ledger.set(torch.cuda.memory, private.__name__, private, reason)
    for name in _NOTHING_TO_DO:
        _everywhere(ledger, name, _constant(name, None), reason)
    for name in _NOTHING_IN_USE:
        _everywhere(ledger, name, _constant(name, 0), reason)


def _available(unknown: int) -> int:
    """Bytes that the host can give to new processes; `unknown` where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return unknown


def _constant(name: str, value: Any) -> Callable[..., Any]:
    # One function object per name: TorchDynamo's tables refuse one object under two names.
    def function(*_args: Any, **_kwargs: Any) -> Any:
        return value

    function.__name__ = function.__qualname__ = name
    return function


def _everywhere(ledger: PatchLedger, name: str, value: Any, reason: str) -> None:
    if not name.startswith("_"):
        ledger.set(torch.cuda, name, value, reason)
    if hasattr(torch.cuda.memory, name):
        ledger.set(torch.cuda.memory, name, value, reason)
