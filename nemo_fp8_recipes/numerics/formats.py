"""The FP8 element formats: E4M3 and E5M2.

`E4M3` is the variant without infinities (OCP "FN"): largest finite value 448, NaN is 0x7F. `E5M2` follows
IEEE 754: largest finite value 57344, has infinities. A HYBRID recipe uses E4M3 in the forward pass and E5M2
for gradients.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch

from nemo_fp8_recipes.errors import RecipeError, nearest

__all__ = ["E4M3", "E5M2", "FORMATS", "Fp8Format"]


@dataclass(frozen=True)
class Fp8Format:
    """One FP8 element format.

    Attributes:
        name: "e4m3" or "e5m2".
        torch_dtype: torch's dtype of the same bit layout.
        max: largest finite magnitude; what an amax is mapped to.
        mantissa_bits: stored mantissa bits.
        min_subnormal: smallest magnitude above zero; half of it and below rounds to zero.
    """

    name: str
    torch_dtype: torch.dtype
    max: float
    mantissa_bits: int
    min_subnormal: float

    @property
    def max_reciprocal(self) -> float:
        """1 / max rounded to fp32: the factor of the MXFP8 scale (`Quantized_Limits::max_norm_rcp`)."""
        reciprocal: float = struct.unpack("f", struct.pack("f", 1.0 / self.max))[0]
        return reciprocal

    @classmethod
    def from_name(cls, name: str) -> Fp8Format:
        """The format called `name`.

        Raises:
            RecipeError: no such format.
        """
        try:
            return FORMATS[name]
        except KeyError:
            close = nearest(name, FORMATS)
            raise RecipeError(
                f"There is no FP8 element format {name!r}.",
                key="format",
                value=name,
                allowed=FORMATS,
                hint=f"Did you mean {close}?" if close else None,
            ) from None


E4M3 = Fp8Format("e4m3", torch.float8_e4m3fn, 448.0, mantissa_bits=3, min_subnormal=2.0**-9)
E5M2 = Fp8Format("e5m2", torch.float8_e5m2, 57344.0, mantissa_bits=2, min_subnormal=2.0**-16)

FORMATS: dict[str, Fp8Format] = {fmt.name: fmt for fmt in (E4M3, E5M2)}
