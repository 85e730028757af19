"""Where the scales of a block-scaled tensor lie.

Layouts, from `get_scale_shape` of `Float8BlockQuantizer`, `MXFP8Quantizer` and `NVFP4Quantizer` and from
`common/swizzle/swizzle.cu`:

    blockwise 1D rowwise      fp32 (ceil(K/128), M padded to 4)
    blockwise 1D columnwise   fp32 (ceil(M/128), K padded to 4)
    blockwise 2D rowwise      fp32 (ceil(M/128), ceil(K/128) padded to 4)
    blockwise 2D columnwise   fp32 (ceil(K/128), ceil(M/128) padded to 4)
    mxfp8 rowwise             E8M0 (M padded to 128, ceil(K/32) padded to 4)
    mxfp8 columnwise          E8M0 (ceil(M/32) padded to 4, K padded to 128)
    nvfp4 rowwise             E4M3 (M padded to 128, ceil(K/16) padded to 4), also of 16x16 blocks
    nvfp4 columnwise          E4M3 (K padded to 128, ceil(M/16) padded to 4)

The padding holds whatever was in memory, so it is left out by index. Scales that were made for the GEMM lie
in tiles of 128 x 4 (mxfp8 columnwise: of the transposed array), and the index follows them there.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch

__all__ = ["SWIZZLES", "ScaleGrid", "scale_grid", "unpadded_positions", "used_positions"]

Swizzle = Literal["", "rowwise", "columnwise"]

SWIZZLES: tuple[Swizzle, ...] = ("", "rowwise", "columnwise")
"""See `unpadded_positions`."""


class ScaleGrid(NamedTuple):
    """The scales of a tensor in one direction: rows and columns in use and allocated, and how they are
    swizzled.
    """

    rows: int
    columns: int
    all_rows: int
    all_columns: int
    swizzle: Swizzle

    @property
    def used(self) -> int:
        return self.rows * self.columns

    @property
    def padded(self) -> bool:
        return self.used != self.all_rows * self.all_columns


def scale_grid(
    recipe: str, quantizer: Any, data: torch.Size, scale: torch.Size, *, rowwise: bool, swizzled: bool
) -> ScaleGrid:
    """From the shapes of data and scales that `quantizer` made."""
    swizzle: Swizzle = ""
    if recipe == "nvfp4":
        # Two codes a byte; columnwise data is stored transposed, so the same rule serves both directions.
        used = (data.numel() // data[-1], -(-data[-1] // 8))
        swizzle = "rowwise" if swizzled else ""
    elif recipe == "mxfp8":
        leading, last = data.numel() // data[-1], data[-1]
        used = (leading, -(-last // 32)) if rowwise else (-(-leading // 32), last)
        if swizzled:
            swizzle = "rowwise" if rowwise else "columnwise"
    else:
        # Columnwise data is stored transposed, so the same rule serves both directions.
        if rowwise:
            leading, last = data.numel() // data[-1], data[-1]
        else:
            leading, last = data[0], data.numel() // data[0]
        rows, columns = -(-leading // 128), -(-last // 128)
        used = (rows, columns) if quantizer.block_scaling_dim == 2 else (columns, leading)
    return ScaleGrid(*used, scale[0], scale[1], swizzle)


def used_positions(grids: Sequence[ScaleGrid]) -> np.ndarray:
    """Positions of the scales in use within the concatenation of all allocated ones, int64."""
    parts, start = [], 0
    for grid in grids:
        parts.append(unpadded_positions(*grid) + start)
        start += grid.all_rows * grid.all_columns
    return np.concatenate(parts)


@functools.lru_cache(maxsize=256)
def unpadded_positions(
    rows: int, columns: int, all_rows: int, all_columns: int, swizzle: Swizzle
) -> np.ndarray:
    """Flat positions, int64 (rows * columns,), of the scales in use in an allocation of all_rows x
    all_columns, in the order of the blocks (columnwise: of the transposed array).

    Args:
        swizzle: "" for a plain row-major array, "rowwise" for tiles of 128 x 4 in the order of cuBLAS' block
            scaling layout (row r, column c of a tile lie at (r % 32) * 16 + (r // 32) * 4 + c), "columnwise"
            for the same of the transposed array.
    """
    if swizzle == "" and rows * columns == all_rows * all_columns:
        return np.arange(rows * columns, dtype=np.int64)
    r, c = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    if swizzle == "":
        return (r * all_columns + c).reshape(-1)
    tiles = all_columns // 4
    if swizzle == "columnwise":
        r, c, tiles = c, r, all_rows // 4
    tile = (r // 128) * tiles + c // 4
    inside = (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4
    positions: np.ndarray = (tile * 512 + inside).reshape(-1)
    return positions
