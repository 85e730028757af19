"""CUDA's runtime as programs reach for it: the profiler and its switch, the check of return codes, the mode
that warns of synchronisation, the version of cuDNN.
"""

from __future__ import annotations

import functools
import types
import warnings
from typing import Any

import torch
import torch.autograd.profiler
import torch.backends.cudnn

from nemo_fp8_recipes.emulation.binding.device import get_cudnn_version
from nemo_fp8_recipes.emulation.ledger import PatchLedger

__all__ = ["apply"]

_MODES = ("default", "warn", "error")


def apply(ledger: PatchLedger) -> None:
    """Stand in for `torch.cuda.cudart` and what depends on it."""
    reason = "torch was built without the CUDA runtime"
    runtime = types.SimpleNamespace(
        cudaError=types.SimpleNamespace(success=0), cudaProfilerStart=_success, cudaProfilerStop=_success
    )
    mode = [0]

    def cudart() -> Any:
        return runtime

    def check_error(res: int) -> None:
        if res != runtime.cudaError.success:
            raise RuntimeError(f"CUDA runtime error {res}")  # torch.cuda.CudaError asks CUDA for its text

    def set_sync_debug_mode(debug_mode: int | str) -> None:
        names = (*_MODES, *range(len(_MODES)))
        if debug_mode not in names:
            raise RuntimeError(f"invalid value of debug_mode {debug_mode!r}: expected one of {names}")
        mode[0] = _MODES.index(debug_mode) if isinstance(debug_mode, str) else debug_mode

    def get_sync_debug_mode() -> int:
        return mode[0]

    for function in (cudart, check_error, set_sync_debug_mode, get_sync_debug_mode):
        ledger.set(torch.cuda, function.__name__, function, reason)
    for function in (cudart, check_error):
        ledger.set(torch.cuda.profiler, function.__name__, function, reason)
    ledger.set(
        torch.autograd.profiler.profile,
        "__init__",
        _of_the_host(torch.autograd.profiler.profile.__init__),
        "asked for CUDA's activity, the profiler writes a stack of frames for every operation",
    )
    ledger.set(torch.backends.cudnn, "version", get_cudnn_version, "torch was built without cuDNN")


def _success() -> int:
    return 0


def _of_the_host(init: Any) -> Any:
    """The profiler's constructor without the device, whose work is the host's."""

    @functools.wraps(init)
    def __init__(self: Any, enabled: bool = True, *args: Any, **options: Any) -> None:
        if enabled and (options.get("use_device") == "cuda" or options.get("use_cuda")):
            warnings.warn(
                "The device is emulated: of its activity the profiler sees what the host does.", stacklevel=3
            )
            options |= {"use_device": None, "use_cuda": False}
        init(self, enabled, *args, **options)

    return __init__
