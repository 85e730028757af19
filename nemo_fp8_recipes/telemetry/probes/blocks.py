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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_fp8_recipes.telemetry.linears import Operand
from nemo_fp8_recipes.telemetry.probes.base import COUNT, Combine, Probe, Reading, ReadingSpec, element_format
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
"""What is read of the scales, `scale_inv_<name>`, in the order of `distribution`; how ranks combine it."""


_Made = tuple[Operand, bool, Any, torch.Size, torch.Size, bool]
"""One quantised tensor in one direction: operand, whether rowwise, its quantizer, shapes of data and scales,
whether the scales are swizzled.
"""


@dataclass(frozen=True)
class _Reduction:
    """What follows from the tensors of one reduction, and the ones before it in the step: the same in every
    step that quantises the same.

    Attributes:
        made: the tensors.
        operands: those of the step so far, by slot: operand, whether rowwise, element format, whether the
            scales are powers of two.
        slots: of each of `operands`.
        blocks: of one tensor at most, by slot.
        lengths: blocks of each of the tensors.
        slot_of: slot of each of them.
        cut: positions in `made` of the scales that are sliced out of their padding, with rows and columns.
        padded: of the others, rows and columns in use and allocated, and how they are swizzled; empty where
            none has padding.
        row_slots: slot of every tensor of the step so far.
        device: index tensors on the device, by name.
    """

    made: list[_Made]
    operands: tuple[tuple[Operand, bool, str, bool], ...]
    slots: dict[tuple[Operand, bool], int]
    blocks: dict[int, int]
    lengths: list[int]
    slot_of: list[int]
    cut: tuple[tuple[int, int, int], ...]
    padded: tuple[tuple[int, int, int, int, str], ...]
    row_slots: list[int]
    device: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, recipe: str, made: list[_Made], before: _Reduction | None) -> _Reduction:
        slots = dict(before.slots) if before is not None else {}
        operands = list(before.operands) if before is not None else []
        blocks = dict(before.blocks) if before is not None else {}
        lengths, slot_of, cut, grids = [], [], [], []
        for position, (operand, rowwise, quantizer, data, scale, swizzled) in enumerate(made):
            slot = slots.get((operand, rowwise))
            if slot is None:
                slot = slots[operand, rowwise] = len(operands)
                power_of_two = bool(getattr(quantizer, "force_pow_2_scales", True))
                operands.append((operand, rowwise, element_format(quantizer), power_of_two))
            grid = _grid(recipe, quantizer, data, scale, rowwise, swizzled)
            rows, columns, all_rows, all_columns, swizzle = grid
            if not swizzle and _INDEXED_BLOCKS < rows * columns < all_rows * all_columns:
                cut.append((position, rows, columns))
                grid = (rows, columns, rows, columns, swizzle)
            grids.append(grid)
            lengths.append(rows * columns)
            slot_of.append(slot)
            blocks[slot] = max(blocks.get(slot, 0), rows * columns)
        padded = any(
            rows * columns != all_rows * all_columns for rows, columns, all_rows, all_columns, _ in grids
        )
        return cls(
            made,
            tuple(operands),
            slots,
            blocks,
            lengths,
            slot_of,
            tuple(cut),
            tuple(grids) if padded else (),
            [*(before.row_slots if before is not None else ()), *slot_of],
        )

    def on(self, device: torch.device, name: str, make: Callable[[], np.ndarray]) -> Tensor:
        """What `make` returns, on the device; uploaded once."""
        tensor = self.device.get(name)
        if tensor is None:
            tensor = self.device[name] = torch.from_numpy(make()).to(device, non_blocking=True)
        return tensor

    def kept(self) -> list[int]:
        """Slots that are read: the columnwise ones only of what was never quantised rowwise."""
        return [
            slot
            for slot, (operand, rowwise, _, _) in enumerate(self.operands)
            if rowwise or (operand, True) not in self.slots
        ]


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
        self._known: list[_Reduction] = []
        """The reductions of the last step, in order."""
        self.begin()

    def begin(self) -> None:
        self._made: list[_Made] = []
        self._waiting: list[Tensor] = []
        self._waiting_blocks = 0
        self._reduced: list[_Reduction] = []
        self._counts: list[Tensor] = []
        self._rows: list[Tensor] = []

    def quantised(self, operand: Operand, quantizer: Any, tensor: Any) -> None:
        rowwise, scale, data = True, tensor._rowwise_scale_inv, tensor._rowwise_data
        if scale is None:
            rowwise, scale, data = False, tensor._columnwise_scale_inv, tensor._columnwise_data
        if scale is None or not (blocks := scale.numel()):
            return  # an expert that got no token
        swizzled = getattr(tensor, "_with_gemm_swizzled_scales", False)
        self._made.append((operand, rowwise, quantizer, data.shape, scale.shape, swizzled))
        # An alias, because Transformer Engine empties the attributes of saved tensors.
        self._waiting.append(scale.detach())
        self._waiting_blocks += blocks
        if self._waiting_blocks >= _CHUNK_BLOCKS:
            self._reduce()

    def settle(self) -> None:
        if self._waiting:
            self._reduce()

    def end(self) -> Reading | None:
        self.settle()
        if not self._counts:
            return None
        last = self._reduced[-1]
        counts = self._counts[-1]
        for earlier in self._counts[:-1]:  # more operands were known at the later ones
            counts[: earlier.shape[0]] += earlier
        device = counts.device
        blocks = last.on(device, "blocks", lambda: np.asarray([*last.blocks.values()], dtype=np.float64))
        exact = self._exact(last) if self._rows else None
        table = self._format.distribution(counts, self._indices, exact=exact, more=blocks)
        kept = last.kept()
        if len(kept) != len(last.operands):
            table = table.index_select(1, last.on(device, "kept", lambda: np.asarray(kept, dtype=np.int64)))
        specs = _specs(self._recipe, tuple(last.operands[slot] for slot in kept))
        self.begin()
        return Reading(specs, table.reshape(-1).float())

    def _exact(self, last: _Reduction) -> tuple[Tensor, Tensor]:
        """What fp32 scales have beyond their exponents, for they need not be powers of two: largest and
        smallest, mean and root mean square; fp64 (operands, 2) each.
        """
        rows = torch.cat(self._rows)  # (tensors, 5): maximum, minimum, sum, sum of squares, number
        size = len(last.operands)
        slots = last.on(rows.device, "row_slots", lambda: np.asarray(last.row_slots, dtype=np.int64))
        largest = rows.new_full((size,), -torch.inf).scatter_reduce_(0, slots, rows[:, 0], "amax")
        smallest = rows.new_full((size,), torch.inf).scatter_reduce_(0, slots, rows[:, 1], "amin")
        sums = rows.new_zeros((size, 3)).index_add_(0, slots, rows[:, 2:])
        mean = sums[:, :2] / sums[:, 2:]
        mean[:, 1].sqrt_()
        return torch.stack([largest, smallest], dim=1), mean

    def _reduce(self) -> None:
        """Counts of the scales of every waiting tensor, in one pass over all of them."""
        plan = self._planned()
        waiting, self._waiting, self._made, self._waiting_blocks = self._waiting, [], [], 0
        for position, rows, columns in plan.cut:
            waiting[position] = waiting[position][:rows, :columns]
        flat = torch._C._nn.flatten_dense_tensors(waiting)
        if plan.padded:
            index = plan.on(flat.device, "positions", lambda: _positions(plan.padded))
            flat = flat.index_select(0, index)
        if flat.dtype == torch.float32:
            self._reduce_exactly(flat, plan)
            codes = flat.view(torch.int32).bitwise_right_shift(23).bitwise_and_(0xFF)
        else:
            codes = flat
        self._counts.append(histogram(codes, plan.lengths, plan.slot_of, len(plan.operands), plan.on))
        self._reduced.append(plan)

    def _planned(self) -> _Reduction:
        number = len(self._reduced)
        if number >= len(self._known) or self._known[number].made != self._made:
            before = self._reduced[-1] if self._reduced else None
            self._known[number:] = [_Reduction.of(self._recipe, self._made, before)]
        return self._known[number]

    def _reduce_exactly(self, flat: Tensor, plan: _Reduction) -> None:
        """Maximum, minimum, sum, sum of squares and number of the fp32 scales of each waiting tensor."""
        exact = flat.double()
        index = plan.on(flat.device, "lengths", lambda: np.asarray(plan.lengths, dtype=np.int64))
        columns = [
            torch.segment_reduce(data, reduce, lengths=index, unsafe=True)
            for reduce, data in (("max", exact), ("min", exact), ("sum", exact), ("sum", exact.square()))
        ]
        self._rows.append(torch.stack([*columns, index.double()], dim=1))


def _grid(
    recipe: str, quantizer: Any, data: torch.Size, scale: torch.Size, rowwise: bool, swizzled: bool
) -> tuple[int, int, int, int, str]:
    """Rows and columns of scales in use and allocated, from the shapes, and how they are swizzled."""
    swizzle = ""
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
    return (*used, scale[0], scale[1], swizzle)


@functools.lru_cache(maxsize=16)
def _specs(recipe: str, operands: tuple[tuple[Operand, bool, str, bool], ...]) -> tuple[ReadingSpec, ...]:
    """What is read of `operands`, as `BlockProbe` keeps them: the same tuple for the same ones."""
    named: tuple[tuple[str, Combine], ...] = (
        *((f"scale_inv_{name}", combine) for name, combine in _STATS),
        ("blocks", "max"),
        (COUNT, "mean"),
    )
    return tuple(
        ReadingSpec(operand.module, operand.tensor, name, recipe, fmt, combine, power_of_two=power_of_two)
        for name, combine in named
        for operand, _, fmt, power_of_two in operands
    )


def _positions(grids: Sequence[tuple[int, int, int, int, str]]) -> np.ndarray:
    """Positions of the scales in use within the concatenation of all allocated ones, int64."""
    parts, start = [], 0
    for grid in grids:
        parts.append(unpadded_positions(*grid) + start)
        start += grid[2] * grid[3]
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
