"""NVFP4: codes and scales, along rows and along columns at once, and back."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.kernels.native import (
    ADDRESS,
    INT,
    KEY,
    LONG,
    MATRIX,
    Native,
    input_tag,
)

__all__ = ["Nvfp4Direction", "Nvfp4Kernels"]


class Nvfp4Direction(NamedTuple):
    """What one direction is quantised into and under: contiguous tensors.

    Attributes:
        codes: uint8.
        scales: uint8.
        amax: fp32, one element, or one for every row of what is quantised.
        key: of the random bits: `numerics.fp4.random_key`.
    """

    codes: Tensor
    scales: Tensor
    amax: Tensor
    key: int = 0


class Nvfp4Kernels(Native):
    """Kernels of NVFP4."""

    def __init__(self, loaded: ctypes.CDLL, team: int | None = None) -> None:
        super().__init__(loaded, team)
        direction = (ADDRESS, ADDRESS, LONG, ADDRESS, KEY)
        self._nvfp4 = self.bind("nvfp4", None, *MATRIX, *(INT,) * 6, *direction, *direction, INT)
        self._amax_with_hadamard = self.bind(
            "amax_with_hadamard", None, ADDRESS, LONG, LONG, INT, ADDRESS, ADDRESS, INT
        )
        codes = (ADDRESS, LONG, LONG, INT)
        self._decode_nvfp4 = self.bind("decode_nvfp4", None, *codes, ADDRESS, LONG, ADDRESS, INT)

    def nvfp4(
        self,
        x: Tensor,
        rowwise: Nvfp4Direction | None,
        columnwise: Nvfp4Direction | None,
        *,
        square: bool,
        stochastic: bool = False,
        sign_mask: int | None = None,
        swizzled: bool = False,
        divided: bool = False,
    ) -> None:
        """NVFP4: `numerics.nvfp4.quantize_1d` and `quantize_2d` of x and of the transposed matrix.

        Args:
            x: [M, K], K a multiple of 16; with `columnwise` M too.
            rowwise: where codes, uint8 [M, K / 2], and scales, uint8 [>= M, >= K / 16], go.
            columnwise: the same of the transposed matrix [K, M].
            square: blocks of 16x16, their scale repeated for each row.
            stochastic: round so, under each direction's key.
            sign_mask: columnwise data is that of `numerics.hadamard.random_hadamard_transform` under it, None
                for no transform; bf16 only, and no squares.
            swizzled: write the scales (padded to 128 x 4) in the GEMM's order.
            divided: as in `numerics`.
        """
        m, k = x.shape
        given = next(each for each in (rowwise, columnwise) if each is not None)
        self._nvfp4(
            x.data_ptr(),
            input_tag(x),
            m,
            k,
            square,
            stochastic,
            -1 if sign_mask is None else sign_mask,
            given.amax.numel() > 1,
            swizzled,
            divided,
            *_arguments(rowwise),
            *_arguments(columnwise),
            self.threads(m * k),
        )

    def amax_with_hadamard(self, x: Tensor, sign_mask: int) -> tuple[Tensor, Tensor]:
        """`numerics.amax` of x, and of `numerics.hadamard.random_hadamard_transform` of x transposed.

        Args:
            x: bf16 [M, K], multiples of 16.
            sign_mask: as in `numerics`.

        Returns:
            fp32 (1,) each.
        """
        m, k = x.shape
        plain, transformed = torch.empty(1), torch.empty(1)
        self._amax_with_hadamard(
            x.data_ptr(), m, k, sign_mask, plain.data_ptr(), transformed.data_ptr(), self.threads(m * k)
        )
        return plain, transformed

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


def _arguments(direction: Nvfp4Direction | None) -> tuple[int | None, int | None, int, int | None, int]:
    """A direction as the C interface takes it."""
    if direction is None:
        return None, None, 0, None, 0
    codes, scales, amax, key = direction
    return codes.data_ptr(), scales.data_ptr(), scales.shape[1], amax.data_ptr(), key
