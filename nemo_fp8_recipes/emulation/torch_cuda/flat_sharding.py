"""`FullyShardedDataParallel` (FSDP1) of a model on the posing device.

It looks for an accelerator, and computes where that is: the parameters are on the host, the streams and
events that it uses are those of `torch.cuda`.
"""

# ruff: noqa: ARG001 -- the signatures are torch's

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from nemo_fp8_recipes.emulation.import_hook import after_import
from nemo_fp8_recipes.emulation.ledger import PatchLedger

__all__ = ["apply"]

_PACKAGE = "torch.distributed.fsdp"
_REASON = (
    "FSDP refuses to shard where it finds no accelerator, and parameters on the posing device are the host's"
)
_HOST = torch.device("cpu")


def apply(ledger: PatchLedger) -> None:
    """Let FSDP take what is on the posing device, whether it has been imported or not."""
    for name, change in (("_common_utils", _give_handle), ("_init_utils", _accept_posing)):
        module = f"{_PACKAGE}.{name}"
        if module in sys.modules:
            change(ledger, sys.modules[module])
        else:
            after_import(ledger, module, functools.partial(change, ledger), _REASON)


def _give_handle(ledger: PatchLedger, module: ModuleType) -> None:
    handle = vars(module)["_FSDPDeviceHandle"]
    original = handle.from_device

    def from_device(device: torch.device) -> Any:
        return torch.cuda if device.type == "cpu" else original(device)

    ledger.set(handle, "from_device", staticmethod(from_device), _REASON)


def _accept_posing(ledger: PatchLedger, module: ModuleType) -> None:
    init_handle = module._init_device_handle

    @functools.wraps(init_handle)
    def _init_device_handle(state: Any, wrapped: Any, ignored: Any, device_id: Any) -> Any:
        return init_handle(state, wrapped, ignored, _HOST)

    def _get_device_from_device_id(device_id: Any, rank: int, *device_handle: Any) -> Any:
        return None if device_id is None else _HOST

    def _get_compute_device(*_arguments: Any) -> torch.device:
        return _HOST

    def _warn_cpu_init() -> None:
        return None

    def _check_module_states_for_sync_module_states(module_states: Any) -> None:
        return None

    replacements: tuple[Callable[..., Any], ...] = (
        _init_device_handle,
        _get_device_from_device_id,
        _get_compute_device,
        _warn_cpu_init,
        _check_module_states_for_sync_module_states,
    )
    # FSDP's own module may hold these by name already.
    holders = [module, sys.modules.get(f"{_PACKAGE}.fully_sharded_data_parallel")]
    for replacement in replacements:
        for holder in holders:
            if holder is not None and replacement.__name__ in vars(holder):
                ledger.set(holder, replacement.__name__, replacement, _REASON)
