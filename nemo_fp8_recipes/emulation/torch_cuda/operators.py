"""Custom operators that are registered for CUDA alone: they are those of the posing device's tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nemo_fp8_recipes.emulation.ledger import PatchLedger

__all__ = ["apply"]

Devices = str | Sequence[str] | None


def apply(ledger: PatchLedger) -> None:
    """Let what `custom_op` and `register_kernel` register for "cuda" be the host's too.

    Not what `impl` registers: there a second kernel for the host would be refused.
    """
    reason = "tensors of the posing device are the host's, for which no operator of CUDA's is looked up"
    library = torch.library

    def custom_op(
        name: str, fn: Callable[..., Any] | None = None, /, *, device_types: Devices = None, **options: Any
    ) -> Any:
        return original_custom_op(name, fn, device_types=_with_the_host(device_types), **options)

    def register_kernel(op: Any, device_types: Devices, func: Any = None, /, **options: Any) -> Any:
        return original_register_kernel(op, _with_the_host(device_types), func, **options)

    def method(self: Any, device_types: Devices, fn: Any = None, /) -> Any:
        return original_method(self, _with_the_host(device_types), fn)

    original_custom_op = library.custom_op
    original_register_kernel = library.register_kernel
    original_method = library.CustomOpDef.register_kernel
    ledger.set(library, "custom_op", functools.wraps(original_custom_op)(custom_op), reason)
    ledger.set(library, "register_kernel", functools.wraps(original_register_kernel)(register_kernel), reason)
    ledger.set(library.CustomOpDef, "register_kernel", functools.wraps(original_method)(method), reason)


def _with_the_host(device_types: Devices) -> Devices:
    if device_types is None:
        return None
    named = (device_types,) if isinstance(device_types, str) else tuple(device_types)
    return (*named, "cpu") if "cuda" in named and "cpu" not in named else named
