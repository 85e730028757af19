"""Autocast for the device acts where its tensors are: `torch.autocast("cuda")` switches the host's, too.

The CUDA switch is set as well, because Transformer Engine reads its dtype from it; activation checkpointing
restores both for the recomputation.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.utils.checkpoint

from nemo_fp8_recipes.emulation.ledger import PatchLedger

__all__ = ["apply"]


def apply(ledger: PatchLedger) -> None:
    """Make entering CUDA autocast enter the host's with the same dtype, and leaving it leave that."""
    make, enter, leave = torch.autocast.__init__, torch.autocast.__enter__, torch.autocast.__exit__
    reason = "the tensors that CUDA autocast is meant for are on the host"

    @functools.wraps(make)
    def make_mirrored(
        self: Any,
        device_type: str,
        dtype: torch.dtype | None = None,
        enabled: bool = True,
        cache_enabled: bool | None = None,
    ) -> None:
        """The host's autocast to float32, which torch refuses, can be made within the device's: activation
        checkpointing does that for the recomputation.
        """
        float32 = device_type == "cpu" and dtype == torch.float32 == _device_dtype()
        make(self, device_type, dtype, enabled and not float32, cache_enabled)
        if float32:
            self._enabled = enabled

    @functools.wraps(enter)
    def enter_both(self: Any) -> Any:
        if self.device == "cuda":
            host = torch.autocast("cpu", enabled=False, cache_enabled=self._cache_enabled)
            # Set here: the constructor refuses float32 for the host, which CUDA takes.
            host._enabled, host.fast_dtype = self._enabled, self.fast_dtype
            self.__dict__.setdefault("_host_autocasts", []).append(host)
            enter(host)
        return enter(self)

    @functools.wraps(leave)
    def leave_both(self: Any, *exception: Any) -> Any:
        result = leave(self, *exception)
        if self.device == "cuda" and self.__dict__.get("_host_autocasts"):
            leave(self._host_autocasts.pop(), *exception)
        return result

    ledger.set(torch.autocast, "__init__", make_mirrored, reason)
    ledger.set(torch.autocast, "__enter__", enter_both, reason)
    ledger.set(torch.autocast, "__exit__", leave_both, reason)
    ledger.set(
        torch.utils.checkpoint.DefaultDeviceType,
        "_default_device_type",
        "cuda",
        "checkpointing restores the autocast of the device that it believes the tensors to be on",
    )


def _device_dtype() -> torch.dtype | None:
    """To which the device's autocast casts now; None where it is off."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
