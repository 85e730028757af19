"""MXFP8: blocks of 32 with E8M0 scales, along rows and columns at once, and back."""

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
    NOTHING,
    Native,
    Quantized,
    address,
    format_tag,
    input_tag,
)
from nemo_fp8_recipes.numerics.formats import Fp8Format

__all__ = ["Mxfp8Kernels"]


class Mxfp8Kernels(Native):
    """Kernels of MXFP8."""

    def __init__(self, loaded: ctypes.CDLL, team: int | None = None) -> None:
        super().__init__(loaded, team)
        scales = (ADDRESS, ADDRESS, LONG)
        self._mxfp8 = self.bind("mxfp8", None, *MATRIX, INT, FLOAT, INT, INT, *scales, *scales, LONG, INT)
        codes = (ADDRESS, LONG, LONG, INT, INT, INT)
        self._decode_mxfp8 = self.bind("decode_mxfp8", None, *codes, ADDRESS, LONG, LONG, ADDRESS, INT)

    def mxfp8(
        self,
        x: Tensor,
        fmt: Fp8Format,
        rowwise: Quantized | None,
        columnwise: Quantized | None,
        *,
        square: bool,
        swizzled: bool,
    ) -> None:
        """MXFP8: `numerics.mxfp8.quantize_rowwise`, `quantize_columnwise` and `quantize_2d`.

        Args:
            x: [M, K], multiples of 32.
            fmt: element format.
            rowwise: where codes [M, K] and scales, uint8 [>= M, >= K / 32], go.
            columnwise: where codes [M, K] and scales, uint8 [>= M / 32, >= K], go.
            square: blocks of 32x32, their scale repeated.
            swizzled: write the scales (padded to 128 x 4) in the GEMM's order.
        """
        m, k = x.shape
        rows, columns = rowwise or NOTHING, columnwise or NOTHING
        self._mxfp8(
            x.data_ptr(),
            input_tag(x),
            m,
            k,
            format_tag(fmt),
            fmt.max_reciprocal,
            square,
            swizzled,
            address(rows.codes),
            address(rows.scales),
            rows.stride,
            address(columns.codes),
            address(columns.scales),
            0 if columns.scales is None else columns.scales.shape[0],
            columns.stride,
            self.threads(m * k),
        )

    def decode_mxfp8(
        self, codes: Tensor, scales: Tensor, fmt: Fp8Format, *, columnwise: bool, swizzled: bool
    ) -> Tensor:
        """fp32 values [M, K]: `numerics.mxfp8.dequantize_rowwise` and `dequantize_columnwise`.

        Args:
            codes: uint8 [M, K].
            scales: uint8, padded as in `mxfp8`.
            fmt: element format.
            columnwise: the blocks run along columns.
            swizzled: the scales are in the GEMM's order.
        """
        m, k = codes.shape
        values = torch.empty(m, k, dtype=torch.float32)
        rows, stride = scales.shape
        self._decode_mxfp8(
            codes.data_ptr(),
            m,
            k,
            format_tag(fmt),
            columnwise,
            swizzled,
            scales.data_ptr(),
            rows,
            stride,
            values.data_ptr(),
            self.threads(m * k),
        )
        return values
