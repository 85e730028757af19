"""Fused CPU kernels of the emulated device's quantisers.

`numerics/` is the readable reference, in torch operations; these kernels give the same bits in one pass over
the input. They are a small C++ source (`source/`), compiled on first use with the machine's own compiler into
a cache (`build.py`) and called through ctypes (`compiled.py`): nothing is compiled at installation, and no
wheel depends on a platform. Without a compiler everything still runs, through `numerics/`, and one warning
says that it is slower.

    build.py     compiler, cache, the shared library
    compiled.py  the functions in it, on torch tensors
    source/      the C++

`NEMO_FP8_KERNELS=eager` switches them off.
"""

from __future__ import annotations

from nemo_fp8_recipes.emulation.kernels.build import SlowKernelsWarning
from nemo_fp8_recipes.emulation.kernels.compiled import Library, Quantized, for_codes, for_tensor, library

__all__ = ["Library", "Quantized", "SlowKernelsWarning", "for_codes", "for_tensor", "library"]
