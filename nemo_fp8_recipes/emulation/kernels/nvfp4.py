"""NVFP4: codes and scales, the transposed and transformed matrices that they are made of, and back."""

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
    Quantized,
    address,
    input_tag,
)

__all__ = ["Nvfp4Kernels"]


class Nvfp4Kernels(Native):
    """Kernels of NVFP4."""

    def __init__(self, loaded: ctypes.CDLL, team: int | None = None) -> None:
        super().__init__(loaded, team)
        scales = (ADDRESS, ADDRESS, ADDRESS, LONG)
        self._nvfp4 = self.bind("nvfp4", None, *MATRIX, ADDRESS, INT, INT, INT, *scales, INT)
        self._transpose = self.bind("transpose", None, ADDRESS, LONG, LONG, INT, ADDRESS, INT)
        self._hadamard = self.bind("hadamard_columns", FLOAT, ADDRESS, LONG, LONG, INT, ADDRESS, INT)
        codes = (ADDRESS, LONG, LONG, INT)
        self._decode_nvfp4 = self.bind("decode_nvfp4", None, *codes, ADDRESS, LONG, ADDRESS, INT)

    def nvfp4(
        self,
        x: Tensor,
        amax: Tensor,
        out: Quantized,
        *,
        square: bool,
        swizzled: bool = False,
        random: Tensor | None = None,
    ) -> None:
        """NVFP4: `numerics.nvfp4.quantize_1d` and `quantize_2d`.

        Args:
            x: [M, K], K a multiple of 16.
            amax: fp32, one element or M.
            out: where codes, uint8 [M, K / 2], and scales, uint8 [>= M, >= K / 16], go.
            square: blocks of 16x16, their scale repeated for each row.
            swizzled: write the scales (padded to 128 x 4) in the GEMM's order.
            random: uint8 [M, K] for stochastic rounding.
        """
        m, k = x.shape
        self._nvfp4(
            x.data_ptr(),
            input_tag(x),
            m,
            k,
            amax.data_ptr(),
            amax.numel() > 1,
            square,
            swizzled,
            address(random),
            address(out.codes),
            address(out.scales),
            out.stride,
            self.threads(m * k),
        )

    def transpose(self, x: Tensor) -> Tensor:
        """The transposed matrix [K, M] of x [M, K], contiguous."""
        m, k = x.shape
        out = torch.empty(k, m, dtype=x.dtype)
        self._transpose(x.data_ptr(), m, k, x.itemsize, out.data_ptr(), self.threads(m * k))
        return out

    def hadamard_columns(self, x: Tensor, sign_mask: int) -> tuple[Tensor, float]:
        """`numerics.hadamard.random_hadamard_transform` of x transposed, and the amax of that, NaN ignored.

        Args:
            x: bf16 [M, K], M a multiple of 16.
            sign_mask: as in `numerics`.

        Returns:
            bf16 [K, M] and the amax.
        """
        m, k = x.shape
        out = torch.empty(k, m, dtype=x.dtype)
        largest: float = self._hadamard(x.data_ptr(), m, k, sign_mask, out.data_ptr(), self.threads(m * k))
        return out, largest

    def decode_nvfp4(self, packed: Tensor, scales: Tensor, *, swizzled: bool = False) -> Tensor:
        """code * block scale, fp32 [M, K]: `numerics.nvfp4.block_values` of scales for blocks of 1x16.

        Args:
            packed: uint8 [M, K / 2].
            scales: uint8 [>= M, >= K / 16].
            swizzled: the scales (padded to 128 x 4) are in the GEMM's order.
        """
        m, half = packed.shape
        values = torch.empty(m, 2 * half, dtype=torch.float32)
        self._decode_nvfp4(
            packed.data_ptr(),
            m,
            2 * half,
            swizzled,
            scales.data_ptr(),
            scales.stride(0),
            values.data_ptr(),
            self.threads(2 * m * half),
        )
        return values
