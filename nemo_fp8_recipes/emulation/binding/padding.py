"""Padding of the row groups of a grouped matrix multiplication.

Follows `pytorch/csrc/extensions/padding.cpp` and `common/util/padding.cu` of Transformer Engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_fp8_recipes.emulation.binding.checks import nvte_check

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["fused_multi_row_padding", "fused_multi_row_unpadding"]

SOURCE = "pytorch/csrc/extensions/padding.cpp"


def fused_multi_row_padding(
    input: Tensor, output: Tensor, input_row_list: Sequence[int], padded_input_row_list: Sequence[int]
) -> None:
    """Copy groups of rows; each is followed by zeros up to its padded number of rows."""
    _check(input, output, input_row_list, padded_input_row_list)
    read = write = 0
    for rows, padded in zip(input_row_list, padded_input_row_list, strict=True):
        if rows > 0:
            output[write : write + rows].copy_(input[read : read + rows])
            output[write + rows : write + padded].zero_()
        read += rows
        write += padded


def fused_multi_row_unpadding(
    input: Tensor, output: Tensor, input_row_list: Sequence[int], unpadded_input_row_list: Sequence[int]
) -> None:
    """Copy groups of rows without their padding."""
    _check(input, output, input_row_list, unpadded_input_row_list)
    read = write = 0
    for padded, rows in zip(input_row_list, unpadded_input_row_list, strict=True):
        output[write : write + rows].copy_(input[read : read + rows])
        read += padded
        write += rows


def _check(input: Tensor, output: Tensor, rows: Sequence[int], padded: Sequence[int]) -> None:
    nvte_check(len(rows) == len(padded), SOURCE, "Number of input row list and padded row list must match.")
    nvte_check(input.dim() == 2, SOURCE, "Dimension of input must equal 2.")
    nvte_check(output.dim() == 2, SOURCE, "Dimension of output must equal 2.")
