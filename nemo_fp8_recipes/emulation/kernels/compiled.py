"""All compiled kernels of this process: found once, and who may use them."""

from __future__ import annotations

import ctypes
import os
import threading
import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from nemo_fp8_recipes.emulation.kernels import build
from nemo_fp8_recipes.emulation.kernels.block_scales import BlockScaleKernels
from nemo_fp8_recipes.emulation.kernels.blockwise import BlockwiseKernels
from nemo_fp8_recipes.emulation.kernels.history import HistoryKernels
from nemo_fp8_recipes.emulation.kernels.measure import MeasureKernels
from nemo_fp8_recipes.emulation.kernels.mxfp8 import Mxfp8Kernels
from nemo_fp8_recipes.emulation.kernels.native import INPUTS
from nemo_fp8_recipes.emulation.kernels.nvfp4 import Nvfp4Kernels
from nemo_fp8_recipes.emulation.kernels.per_tensor import PerTensorKernels

__all__ = ["Library", "for_codes", "for_tensor", "library", "must_compile", "on_host"]

_SWITCH = "NEMO_FP8_KERNELS"


class Library(
    PerTensorKernels,
    Mxfp8Kernels,
    BlockwiseKernels,
    Nvfp4Kernels,
    MeasureKernels,
    BlockScaleKernels,
    HistoryKernels,
):
    """The functions of a loaded library, on torch tensors.

    Quantisers write into tensors that their caller allocated. Inputs are contiguous host tensors; the caller
    has checked shapes. What a function computes is defined by the function of `numerics/` that its docstring
    names.
    """


_lock = threading.Lock()
_library: Library | None = None
_looked = False


def library() -> Library | None:
    """The compiled kernels, built on the first call; None without them, which one warning explains."""
    global _library, _looked
    if not _looked:
        with _lock:
            if not _looked:
                _library = _find()
                _looked = True
    return _library


def must_compile() -> bool:
    """Whether the first quantisation of this process waits, some seconds, for the compiler."""
    return not _looked and os.environ.get(_SWITCH, "") != "eager" and build.must_compile()


def for_tensor(x: Tensor) -> Library | None:
    """The kernels, where they can read `x`: a plain fp32, bf16 or fp16 host tensor."""
    return library() if x.dtype in INPUTS and on_host(x) else None


def for_codes(codes: Tensor) -> Library | None:
    """The kernels, where they can read these codes: contiguous on the host."""
    return library() if on_host(codes) and codes.is_contiguous() else None


def on_host(x: Tensor) -> bool:
    """Whether `x` has memory on the host that a kernel can read; a FakeTensor, for one, has none."""
    return type(x) in (Tensor, Parameter) and x.device.type == "cpu"


def _find() -> Library | None:
    choice = os.environ.get(_SWITCH, "")
    if choice == "eager":
        return None
    try:
        return Library(build.load(), _torch_team())
    except build.CannotBuildError as error:
        warnings.warn(
            "The emulated device runs without its compiled kernels: the results are the same, the steps are "
            f"slower. Reason: {error}.",
            build.SlowKernelsWarning,
            stacklevel=2,
        )
        return None


def _torch_team() -> int | None:
    """Address of `GOMP_parallel` in the OpenMP runtime that torch is linked with, None where it has none.

    Threads of two runtimes, or of a runtime and our own, would take the cores from each other.
    """
    if not torch.backends.openmp.is_available():
        return None
    for name in ("libtorch_cpu.so", "libtorch.so"):
        try:
            # Loaded already: this finds it, and looks the name up in what it depends on.
            function = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))["GOMP_parallel"]
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value
    return None
