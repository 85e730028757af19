"""Block scaling (blockwise, MXFP8, NVFP4): the distribution of a tensor's block scales.

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
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nemo_fp8_recipes.telemetry.linears import Operand
from nemo_fp8_recipes.telemetry.probes.base import Combine, Probe, Reading, ReadingSpec, element_format
from nemo_fp8_recipes.telemetry.probes.index import IndexCache
from nemo_fp8_recipes.telemetry.probes.scale_codes import (
    E4M3_SCALES,
    E8M0_SCALES,
    FP32_SCALES,
    PERCENTILES,
    histogram,
)

__all__ = ["BlockProbe", "unpadded_positions"]

_CHUNK_BLOCKS = 1 << 23
"""Scales that may wait for their reduction; more than that are reduced before the step ends (128 MiB of
indices).
"""

_INDEXED_BLOCKS = 1 << 16
"""Scales of one padded tensor that are picked by index together with those of other tensors. A larger one is
sliced out alone: one kernel more, but no index of its size.
"""

_FORMATS = {"blockwise": FP32_SCALES, "mxfp8": E8M0_SCALES, "nvfp4": E4M3_SCALES}

_STATS: tuple[tuple[str, Combine], ...] = (
    ("max", "max"),
    ("min", "min"),
    ("mean", "mean"),
    ("rms", "rms"),
    *((f"p{percentile:02d}", "min" if percentile < 50 else "max") for percentile in PERCENTILES),
    ("at_min", "max"),
    ("at_max", "max"),
)
"""What is read of the scales, `scale_inv_<name>`, and how ranks combine it."""


class _Scales(NamedTuple):
    """Scales of one quantised tensor in one direction, waiting for their reduction.

    Attributes:
        slot: which operand.
        flat: fp32 or uint8 (allocated scales,), a view.
        grid: (rows, columns) in use and (rows, columns) allocated, and whether they are swizzled, how.
    """

    slot: int
    flat: Tensor
    grid: tuple[int, int, int, int, str]

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1]


class BlockProbe(Probe):
    """The distribution of each operand's block scales over blocks and micro-batches.

    The rowwise scales are read, which fprop and dgrad use; the columnwise ones only for a tensor that was
    never quantised rowwise in the step. Blocks of zeros have the scale code 0 in MXFP8 and NVFP4, and count
    for `scale_inv_at_min` only.
    """

    def __init__(self, indices: IndexCache, recipe: str) -> None:
        self._indices = indices
        self._recipe = recipe
        self._format = _FORMATS[recipe]
        self.begin()

    def begin(self) -> None:
        self._slots: dict[tuple[Operand, bool], int] = {}
        self._operands: list[tuple[Operand, bool, str, bool]] = []
        self._waiting: list[_Scales] = []
        self._waiting_blocks = 0
        self._counts: list[Tensor] = []
        self._rows: list[Tensor] = []
        self._row_slots: list[int] = []
        self._blocks: dict[int, int] = {}

    def quantised(self, operand: Operand, quantizer: Any, tensor: Any) -> None:
        rowwise = tensor._rowwise_scale_inv is not None
        scale = tensor._rowwise_scale_inv if rowwise else tensor._columnwise_scale_inv
        if scale is None or scale.numel() == 0:
            return  # an expert that got no token
        slot = self._slots.get((operand, rowwise))
        if slot is None:
            slot = self._slots[operand, rowwise] = len(self._operands)
            power_of_two = bool(getattr(quantizer, "force_pow_2_scales", True))
            self._operands.append((operand, rowwise, element_format(quantizer), power_of_two))
        grid = self._grid(quantizer, tensor, scale, rowwise)
        rows, columns, all_rows, all_columns, swizzle = grid
        scale = scale.detach()
        if not swizzle and _INDEXED_BLOCKS < rows * columns < all_rows * all_columns:
            scale = scale[:rows, :columns]
            grid = (rows, columns, rows, columns, swizzle)
        scales = _Scales(slot, scale.reshape(-1), grid)
        self._blocks[slot] = max(self._blocks.get(slot, 0), scales.blocks)
        self._waiting.append(scales)
        self._waiting_blocks += scales.flat.numel()
        if self._waiting_blocks >= _CHUNK_BLOCKS:
            self._reduce()

    def settle(self) -> None:
        if self._waiting:
            self._reduce()

    def end(self) -> Reading | None:
        self.settle()
        if not self._counts:
            return None
        size = len(self._operands)
        counts = self._counts[-1]
        for earlier in self._counts[:-1]:  # more operands were known at the later ones
            counts[: earlier.shape[0]] += earlier
        read = self._format.distribution(counts, self._indices)
        if self._rows:
            read.update(self._exact(size))
        kept = [
            slot
            for slot, (operand, rowwise, _, _) in enumerate(self._operands)
            if rowwise or (operand, True) not in self._slots
        ]
        blocks = self._indices.on(counts.device, [self._blocks[slot] for slot in range(size)])
        table = torch.stack([*(read[name] for name, _ in _STATS), blocks.to(torch.float64)])
        values = table.index_select(1, self._indices.on(table.device, kept)).reshape(-1).to(torch.float32)
        specs = _specs(self._recipe, tuple(self._operands[slot] for slot in kept))
        self.begin()
        return Reading(specs, values)

    def _exact(self, size: int) -> dict[str, Tensor]:
        """What fp32 scales have beyond their exponents, for they need not be powers of two; fp64 (size,)."""
        rows = torch.cat(self._rows)  # (tensors, 5): maximum, minimum, sum, sum of squares, number
        slots = self._indices.on(rows.device, self._row_slots)
        largest = rows.new_full((size,), -torch.inf).scatter_reduce_(0, slots, rows[:, 0], "amax")
        smallest = rows.new_full((size,), torch.inf).scatter_reduce_(0, slots, rows[:, 1], "amin")
        sums = rows.new_zeros((size, 3)).index_add_(0, slots, rows[:, 2:])
        mean = sums[:, :2] / sums[:, 2:]
        return {"max": largest, "min": smallest, "mean": mean[:, 0], "rms": mean[:, 1].sqrt()}

    def _grid(
        self, quantizer: Any, tensor: Any, scale: Tensor, rowwise: bool
    ) -> tuple[int, int, int, int, str]:
        """Scales in use and allocated, from the shape of the data."""
        swizzle = ""
        if self._recipe == "nvfp4":
            # Two codes a byte; columnwise data is stored transposed, so the same rule serves both directions.
            data = tensor._rowwise_data if rowwise else tensor._columnwise_data
            used = (data.numel() // data.shape[-1], -(-data.shape[-1] // 8))
            if getattr(tensor, "_with_gemm_swizzled_scales", False):
                swizzle = "rowwise"
        elif self._recipe == "mxfp8":
            data = tensor._rowwise_data if rowwise else tensor._columnwise_data
            leading, last = data.numel() // data.shape[-1], data.shape[-1]
            used = (leading, -(-last // 32)) if rowwise else (-(-leading // 32), last)
            if getattr(tensor, "_with_gemm_swizzled_scales", False):
                swizzle = "rowwise" if rowwise else "columnwise"
        else:
            # Columnwise data is stored transposed, so the same rule serves both directions.
            data = tensor._rowwise_data if rowwise else tensor._columnwise_data
            if rowwise:
                leading, last = data.numel() // data.shape[-1], data.shape[-1]
            else:
                leading, last = data.shape[0], data.numel() // data.shape[0]
            rows, columns = -(-leading // 128), -(-last // 128)
            used = (rows, columns) if quantizer.block_scaling_dim == 2 else (columns, leading)
        return (*used, scale.shape[0], scale.shape[1], swizzle)

    def _reduce(self) -> None:
        """Counts of the scales of every waiting tensor, in one pass over all of them."""
        waiting, self._waiting, self._waiting_blocks = self._waiting, [], 0
        flat = torch.cat([scales.flat for scales in waiting])
        if any(scales.flat.numel() != scales.blocks for scales in waiting):
            grids = tuple((scales.grid, scales.flat.numel()) for scales in waiting)
            index = self._indices.made(flat.device, grids, lambda: _positions(waiting))
            flat = flat.index_select(0, index)
        lengths, slots = [scales.blocks for scales in waiting], [scales.slot for scales in waiting]
        if flat.dtype == torch.float32:
            self._reduce_exactly(flat, lengths, slots)
            codes = flat.view(torch.int32).bitwise_right_shift(23).bitwise_and_(0xFF)
        else:
            codes = flat.to(torch.int32)
        self._counts.append(histogram(codes, lengths, slots, len(self._operands), self._indices))

    def _reduce_exactly(self, flat: Tensor, lengths: list[int], slots: list[int]) -> None:
        """Maximum, minimum, sum, sum of squares and number of the fp32 scales of each waiting tensor."""
        exact = flat.to(torch.float64)
        index = self._indices.on(flat.device, lengths)
        columns = [
            torch.segment_reduce(data, reduce, lengths=index, unsafe=True)
            for reduce, data in (("max", exact), ("min", exact), ("sum", exact), ("sum", exact.square()))
        ]
        self._rows.append(torch.stack([*columns, index.to(torch.float64)], dim=1))
        self._row_slots.extend(slots)


@functools.lru_cache(maxsize=16)
def _specs(recipe: str, operands: tuple[tuple[Operand, bool, str, bool], ...]) -> tuple[ReadingSpec, ...]:
    """What is read of `operands`, as `BlockProbe` keeps them: the same tuple for the same ones."""
    named: tuple[tuple[str, Combine], ...] = (
        *((f"scale_inv_{name}", combine) for name, combine in _STATS),
        ("blocks", "max"),
    )
    return tuple(
        ReadingSpec(operand.module, operand.tensor, name, recipe, fmt, combine, power_of_two=power_of_two)
        for name, combine in named
        for operand, _, fmt, power_of_two in operands
    )


def _positions(waiting: list[_Scales]) -> np.ndarray:
    """Positions of the scales in use within the concatenation of all allocated ones, int64."""
    parts, start = [], 0
    for scales in waiting:
        parts.append(unpadded_positions(*scales.grid) + start)
        start += scales.flat.numel()
    return np.concatenate(parts)


@functools.lru_cache(maxsize=256)
def unpadded_positions(rows: int, columns: int, all_rows: int, all_columns: int, swizzle: str) -> np.ndarray:
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
