"""Fused CPU kernels of the emulated device's quantisers, and of what telemetry reads of them.

`numerics/` is the readable reference, in torch operations; these kernels give the same bits in one pass over
the input. They are a small C++ source (`source/`), compiled on first use with the machine's own compiler into
a cache (`build.py`) and called through ctypes: nothing is compiled at installation, and no wheel depends on a
platform. Without a compiler everything still runs, through `numerics/`, and one warning says that it is
slower.

    build.py     compiler, cache, the shared library
    native.py    a loaded library, its threads, tensors as C sees them
    per_tensor.py, mxfp8.py, blockwise.py, nvfp4.py
                 the functions of a format, on torch tensors
    measure.py   what telemetry finds out about a quantised tensor
    block_scales.py
                 what telemetry reads of block scales
    compiled.py  all of them together; the library of this process
    source/      the C++

`NEMO_FP8_KERNELS=eager` switches them off.
"""

from __future__ import annotations

from nemo_fp8_recipes.emulation.kernels.build import SlowKernelsWarning
from nemo_fp8_recipes.emulation.kernels.compiled import (
    Library,
    for_codes,
    for_tensor,
    library,
    must_compile,
    on_host,
)
from nemo_fp8_recipes.emulation.kernels.native import Quantized
from nemo_fp8_recipes.emulation.kernels.nvfp4 import Nvfp4Direction

__all__ = [
    "Library",
    "Nvfp4Direction",
    "Quantized",
    "SlowKernelsWarning",
    "for_codes",
    "for_tensor",
    "library",
    "must_compile",
    "on_host",
]
