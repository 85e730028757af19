"""FP8 block scaling: 1x128 and 128x128 blocks with fp32 scales, and back."""

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

__all__ = ["BlockwiseKernels"]


class BlockwiseKernels(Native):
    """Kernels of FP8 block scaling."""

    def __init__(self, loaded: ctypes.CDLL, team: int | None = None) -> None:
        super().__init__(loaded, team)
        scales = (ADDRESS, ADDRESS, LONG)
        self._blockwise = self.bind("blockwise", None, *MATRIX, INT, FLOAT, INT, INT, *scales, *scales, INT)
        codes = (ADDRESS, LONG, LONG, INT, INT)
        self._decode_blockwise = self.bind("decode_blockwise", None, *codes, ADDRESS, LONG, ADDRESS, INT)

    def blockwise(
        self,
        x: Tensor,
        fmt: Fp8Format,
        rowwise: Quantized | None,
        columnwise: Quantized | None,
        *,
        square: bool,
        epsilon: float,
        power_of_two: bool,
    ) -> None:
        """FP8 block scaling: `numerics.blockwise.quantize_1d`, `quantize_1d_columnwise` and `quantize_2d`.

        Args:
            x: [M, K].
            fmt: element format.
            rowwise: where codes [M, K] and scales, fp32 [ceil(K / 128), >= M] (square: [ceil(M / 128),
                >= ceil(K / 128)]), go.
            columnwise: where the same of the transposed matrix goes: codes [K, M].
            square: blocks of 128x128.
            epsilon, power_of_two: as in `numerics`.
        """
        m, k = x.shape
        rows, columns = rowwise or NOTHING, columnwise or NOTHING
        self._blockwise(
            x.data_ptr(),
            input_tag(x),
            m,
            k,
            format_tag(fmt),
            epsilon,
            power_of_two,
            square,
            address(rows.codes),
            address(rows.scales),
            rows.stride,
            address(columns.codes),
            address(columns.scales),
            columns.stride,
            self.threads(m * k),
        )

    def decode_blockwise(self, codes: Tensor, scales: Tensor, fmt: Fp8Format, *, square: bool) -> Tensor:
        """fp32 values [M, K]: `numerics.blockwise.dequantize_1d` and `dequantize_2d`, of the scales as
        `blockwise` writes the rowwise ones.
        """
        m, k = codes.shape
        values = torch.empty(m, k, dtype=torch.float32)
        self._decode_blockwise(
            codes.data_ptr(),
            m,
            k,
            format_tag(fmt),
            square,
            scales.data_ptr(),
            scales.shape[1],
            values.data_ptr(),
            self.threads(m * k),
        )
        return values
