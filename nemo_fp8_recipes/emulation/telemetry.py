"""Compiled kernels for what telemetry finds out about host tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from nemo_fp8_recipes.emulation.ledger import PatchLedger

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_fp8_recipes.telemetry.coded import Coded

__all__ = ["apply"]


def apply(ledger: PatchLedger) -> None:
    """Fill the names of `nemo_fp8_recipes.telemetry.host_kernels`. Nothing is compiled before one is used."""
    from nemo_fp8_recipes.telemetry import host_kernels

    for name, function in _functions().items():
        ledger.set(host_kernels, name, function, "a host tensor takes many torch operations, or one kernel")


def _functions() -> Mapping[str, Callable[..., Any]]:
    """Functions by their names in `host_kernels`."""
    return {"measure": _measure}


def _measure(source: Tensor, coded: Coded) -> Tensor | None:
    from nemo_fp8_recipes.emulation.kernels import for_tensor

    kernels = for_tensor(source)
    return kernels.measure(source, coded) if kernels is not None else None
