"""Quantisers and dequantisers of every FP8 and FP4 recipe in plain torch operations.

Bit-exact with the rules of Transformer Engine's CUDA sources, on any device, with no host synchronisation and
nothing patched. One recipe a module:

- `tensorwise`: per-tensor current scaling
- `delayed`: per-tensor delayed scaling and its amax history
- `blockwise`: 1x128 and 128x128 blocks with fp32 scales
- `mxfp8`: blocks of 32 with E8M0 scales
- `nvfp4`: FP4 in blocks of 16 with E4M3 scales, after `hadamard`'s transform where asked for

below them `formats`, `cast`, `fp4`, `scale`, `e8m0` and `blocks`.
"""

from nemo_fp8_recipes.numerics import blockwise, delayed, hadamard, mxfp8, nvfp4, tensorwise
from nemo_fp8_recipes.numerics.cast import decode, saturating_cast
from nemo_fp8_recipes.numerics.formats import E4M3, E5M2, FORMATS, Fp8Format
from nemo_fp8_recipes.numerics.scale import amax, scale_from_amax

__all__ = [
    "E4M3",
    "E5M2",
    "FORMATS",
    "Fp8Format",
    "amax",
    "blockwise",
    "decode",
    "delayed",
    "hadamard",
    "mxfp8",
    "nvfp4",
    "saturating_cast",
    "scale_from_amax",
    "tensorwise",
]
