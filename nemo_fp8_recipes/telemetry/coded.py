"""A quantised matrix as it is stored, whatever the recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Coded"]


class Coded(NamedTuple):
    """Codes, and the scales of their blocks.

    Attributes:
        codes: uint8 (rows, columns); of "e2m1" (rows, columns / 2), the first of two codes in the low half.
        scales: what the codes of each block are multiplied with, (ceil(rows / block rows), ceil(columns /
            block columns)), not necessarily contiguous: fp32, or uint8 E8M0 codes; of "e2m1" uint8 E4M3
            codes. Of a `swizzle` all that is allocated, padding too.
        format: element format, "e4m3", "e5m2" or "e2m1".
        block: rows and columns of a block.
        swizzle: "" or how the scales are arranged for the GEMM, see `probes.blocks.unpadded_positions`.
        amax: of "e2m1" the tensor's, from which its global scale follows: fp32, one element or `rows`.
        rowwise: these are the codes of the forward and the input-gradient GEMM; else the weight gradient's.
    """

    codes: Tensor
    scales: Tensor
    format: str
    block: tuple[int, int]
    swizzle: Literal["", "rowwise", "columnwise"] = ""
    amax: Tensor | None = None
    rowwise: bool = True

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        rows, columns = self.codes.shape
        return rows, 2 * columns if self.format == "e2m1" else columns
