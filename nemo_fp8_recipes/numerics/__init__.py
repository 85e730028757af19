"""Quantisers and dequantisers of every FP8 recipe in plain torch operations.

Bit-exact with the rules of Transformer Engine's CUDA sources, on any device, with no host synchronisation and
nothing patched. One recipe a module:

- `tensorwise`: per-tensor current scaling
- `delayed`: per-tensor delayed scaling and its amax history
- `blockwise`: 1x128 and 128x128 blocks with fp32 scales
- `mxfp8`: blocks of 32 with E8M0 scales

below them `formats`, `cast`, `scale`, `e8m0` and `blocks`.
"""

from nemo_fp8_recipes.numerics import blockwise, delayed, mxfp8, tensorwise
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
    "mxfp8",
    "saturating_cast",
    "scale_from_amax",
    "tensorwise",
]
