"""`torch.device(0)`: an index means the posing device, as it does on a machine with a GPU.

`torch.device` is a C type that looks for the machine's accelerator by itself and finds none; it cannot be
changed. A class in its place makes the very same objects, and stands for the type in `isinstance` and in
comparisons of types: no device is an instance of it.
"""

from __future__ import annotations

from typing import Any

import torch

from nemo_fp8_recipes.emulation.ledger import PatchLedger

__all__ = ["apply"]

_REAL = torch.device


class _StandsForDevice(type):
    """Metaclass of what stands in the place of `torch.device`."""

    def __call__(cls, *args: Any, **kwargs: Any) -> torch.device:
        if len(args) == 1 and not kwargs and _is_index(args[0]):
            return _REAL("cuda", args[0])
        if not args and kwargs.keys() == {"device"} and _is_index(kwargs["device"]):
            return _REAL("cuda", kwargs["device"])
        return _REAL(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, _REAL)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return subclass is cls or issubclass(subclass, _REAL)

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is _REAL

    def __hash__(cls) -> int:
        return hash(_REAL)

    def __getattr__(cls, name: str) -> Any:
        return getattr(_REAL, name)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def apply(ledger: PatchLedger) -> None:
    """Let `torch.device` take an index."""
    # Devices are pickled as a call of `torch.device`: the class must be found under that name.
    namespace = {"__module__": "torch", "__qualname__": "device", "__doc__": _REAL.__doc__}
    stand_in = _StandsForDevice("device", (), namespace)
    ledger.set(torch, "device", stand_in, "torch.device(0) is the device of that index")
