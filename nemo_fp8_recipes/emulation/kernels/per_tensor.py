"""Per-tensor FP8: amax, the cast under a given scale, and back."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.kernels.native import (
    ADDRESS,
    FLOAT,
    INT,
    LONG,
    MATRIX,
    Native,
    address,
    format_tag,
    input_tag,
)
from nemo_fp8_recipes.numerics.formats import Fp8Format

__all__ = ["PerTensorKernels"]


class PerTensorKernels(Native):
    """Kernels of delayed and current scaling."""

    def __init__(self, loaded: ctypes.CDLL, team: int | None = None) -> None:
        super().__init__(loaded, team)
        self._amax = self.bind("amax", FLOAT, ADDRESS, INT, LONG, INT)
        self._cast = self.bind("cast", FLOAT, *MATRIX, INT, FLOAT, ADDRESS, ADDRESS, INT, INT)
        self._decode = self.bind("decode", None, ADDRESS, LONG, INT, ADDRESS, INT)

    def amax(self, x: Tensor) -> float:
        """Largest magnitude, NaN ignored, 0 for an empty tensor: `numerics.amax`."""
        count = x.numel()
        largest: float = self._amax(x.data_ptr(), input_tag(x), count, self.threads(count))
        return largest

    def cast(
        self,
        x: Tensor,
        fmt: Fp8Format,
        scale: float,
        codes: Tensor,
        transposed: Tensor | None = None,
        *,
        observe: bool = False,
    ) -> float:
        """Per-tensor codes: `numerics.tensorwise.quantize`.

        Args:
            x: [M, K].
            fmt: element format.
            scale: what x is multiplied with.
            codes: uint8 of M * K elements.
            transposed: uint8 of M * K elements for the codes of x transposed, or None.
            observe: find x's amax too.

        Returns:
            amax of x, NaN ignored, where `observe` is set; else 0.
        """
        m, k = x.shape
        largest: float = self._cast(
            x.data_ptr(),
            input_tag(x),
            m,
            k,
            format_tag(fmt),
            scale,
            codes.data_ptr(),
            address(transposed),
            observe,
            self.threads(m * k),
        )
        return largest

    def decode(self, codes: Tensor, fmt: Fp8Format) -> Tensor:
        """fp32 values of contiguous codes: `numerics.decode`."""
        values = torch.empty(codes.shape, dtype=torch.float32)
        count = codes.numel()
        self._decode(codes.data_ptr(), count, format_tag(fmt), values.data_ptr(), self.threads(count))
        return values
