"""Block scaling (blockwise, MXFP8, NVFP4): the distribution of a tensor's block scales."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_fp8_recipes.telemetry import host_kernels
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
from nemo_fp8_recipes.telemetry.probes.scale_layout import (
    SWIZZLES,
    ScaleGrid,
    scale_grid,
    unpadded_positions,
    used_positions,
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


_Made = tuple[Operand, bool, Any, torch.Size, bool]
"""One quantised tensor in one direction: operand, whether rowwise, its quantizer, shape of the data, whether
the scales are swizzled.
"""


@dataclass(frozen=True)
class _Reduction:
    """What follows from the tensors of one reduction, and the ones before it in the step: the same in every
    step that quantises the same.

    Attributes:
        made: the tensors.
        shapes: of their scales.
        operands: those of the step so far, by slot: operand, whether rowwise, element format, whether the
            scales are powers of two.
        slots: of each of `operands`.
        blocks: of one tensor at most, by slot.
        grids: how the scales of each tensor lie.
        slot_of: slot of each of them.
        cut: positions in `made` of the scales that are sliced out of their padding.
        row_slots: slot of every tensor of the step so far.
        kept: slots that are read: the columnwise ones only of what was never quantised rowwise.
        specs: what is read of `kept`.
        device: index tensors on the device, by name.
    """

    made: list[_Made]
    shapes: list[torch.Size]
    operands: tuple[tuple[Operand, bool, str, bool], ...]
    slots: dict[tuple[Operand, bool], int]
    blocks: dict[int, int]
    grids: tuple[ScaleGrid, ...]
    slot_of: list[int]
    cut: tuple[int, ...]
    row_slots: list[int]
    kept: list[int]
    specs: tuple[ReadingSpec, ...]
    device: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, recipe: str, made: list[_Made], shapes: list[torch.Size], before: _Reduction | None
    ) -> _Reduction:
        slots = dict(before.slots) if before is not None else {}
        operands = list(before.operands) if before is not None else []
        blocks = dict(before.blocks) if before is not None else {}
        slot_of, cut, grids = [], [], []
        for position, ((operand, rowwise, quantizer, data, swizzled), scale) in enumerate(
            zip(made, shapes, strict=True)
        ):
            slot = slots.get((operand, rowwise))
            if slot is None:
                slot = slots[operand, rowwise] = len(operands)
                power_of_two = bool(getattr(quantizer, "force_pow_2_scales", True))
                operands.append((operand, rowwise, element_format(quantizer), power_of_two))
            grid = scale_grid(recipe, quantizer, data, scale, rowwise=rowwise, swizzled=swizzled)
            if not grid.swizzle and grid.padded and grid.used > _INDEXED_BLOCKS:
                cut.append(position)
            grids.append(grid)
            slot_of.append(slot)
            blocks[slot] = max(blocks.get(slot, 0), grid.used)
        kept = [
            slot
            for slot, (operand, rowwise, _, _) in enumerate(operands)
            if rowwise or (operand, True) not in slots
        ]
        return cls(
            made,
            shapes,
            tuple(operands),
            slots,
            blocks,
            tuple(grids),
            slot_of,
            tuple(cut),
            [*(before.row_slots if before is not None else ()), *slot_of],
            kept,
            _specs(recipe, tuple(operands[slot] for slot in kept)),
        )

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Blocks of each of the tensors."""
        return [grid.used for grid in self.grids]

    @functools.cached_property
    def padded(self) -> tuple[ScaleGrid, ...]:
        """How the scales lie once those that are cut are; empty where none has padding then."""
        grids = list(self.grids)
        for position in self.cut:
            rows, columns, *_ = grids[position]
            grids[position] = ScaleGrid(rows, columns, rows, columns, "")
        return tuple(grids) if any(grid.padded for grid in grids) else ()

    def on(self, device: torch.device, name: str, make: Callable[[], np.ndarray]) -> Tensor:
        """What `make` returns, on the device; uploaded once."""
        tensor = self.device.get(name)
        if tensor is None:
            tensor = self.device[name] = torch.from_numpy(make()).to(device, non_blocking=True)
        return tensor

    def index(self, device: torch.device, name: str) -> Tensor:
        """The attribute of this name, as int64 on the device."""
        return self.on(device, name, lambda: np.asarray(getattr(self, name), dtype=np.int64))

    def most_blocks(self, device: torch.device) -> Tensor:
        """`blocks`, fp64 on the device."""
        return self.on(device, "blocks", lambda: np.asarray([*self.blocks.values()], dtype=np.float64))

    def layout(self, device: torch.device) -> Tensor:
        """`grids`, int64 (tensors, 5) on the device, swizzles by their place in `SWIZZLES`."""
        return self.on(
            device,
            "grids",
            lambda: np.asarray([(*grid[:4], SWIZZLES.index(grid.swizzle)) for grid in self.grids], np.int64),
        )


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
        self._may_swizzle = recipe != "blockwise"  # whose tensors lack the attribute
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

    def quantised(self, operand: Operand, quantizer: Any, tensor: Any) -> bool:
        rowwise, scale, data = True, tensor._rowwise_scale_inv, tensor._rowwise_data
        if scale is None:
            rowwise, scale, data = False, tensor._columnwise_scale_inv, tensor._columnwise_data
        if scale is None or not (blocks := scale.numel()):
            return False  # an expert that got no token
        swizzled = self._may_swizzle and getattr(tensor, "_with_gemm_swizzled_scales", False)
        self._made.append((operand, rowwise, quantizer, data.shape, swizzled))
        # An alias, because Transformer Engine empties saved tensors. `detach` would take three times as long.
        self._waiting.append(scale.data)
        self._waiting_blocks += blocks
        if self._waiting_blocks >= _CHUNK_BLOCKS:
            self._reduce()
        return True

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
        values = self._described(counts, last)
        self.begin()
        return Reading(last.specs, values)

    def _described(self, counts: Tensor, last: _Reduction) -> Tensor:
        """The readings of a step, fp32 (len(last.specs),)."""
        device = counts.device
        blocks, kept = last.most_blocks(device), last.index(device, "kept")
        kernel = host_kernels.scale_distribution
        if kernel is not None:
            rows = torch.cat(self._rows) if self._rows else None
            slots = last.index(device, "row_slots")
            found = kernel(counts, self._format, blocks=blocks, kept=kept, exact=rows, slots=slots)
            if found is not None:
                return found
        exact = self._exact(last) if self._rows else None
        table = self._format.distribution(counts, self._indices, exact=exact, more=blocks)
        if len(last.kept) != len(last.operands):
            table = table.index_select(1, kept)
        return table.reshape(-1).float()

    def _exact(self, last: _Reduction) -> tuple[Tensor, Tensor]:
        """What fp32 scales have beyond their exponents, for they need not be powers of two: largest and
        smallest, mean and root mean square; fp64 (operands, 2) each.
        """
        rows = torch.cat(self._rows)
        size = len(last.operands)
        slots = last.index(rows.device, "row_slots")
        largest = rows.new_full((size,), -torch.inf).scatter_reduce_(0, slots, rows[:, 0], "amax")
        smallest = rows.new_full((size,), torch.inf).scatter_reduce_(0, slots, rows[:, 1], "amin")
        sums = rows.new_zeros((size, 3)).index_add_(0, slots, rows[:, 2:])
        mean = sums[:, :2] / sums[:, 2:]
        mean[:, 1].sqrt_()
        return torch.stack([largest, smallest], dim=1), mean

    def _reduce(self) -> None:
        """Counts of the scales of every waiting tensor, in one pass over all of them."""
        waiting, made = self._waiting, self._made
        plan = self._planned(made, [scale.shape for scale in waiting])
        self._waiting, self._made, self._waiting_blocks = [], [], 0
        counts, rows = self._counted(waiting, plan)
        self._counts.append(counts)
        if rows is not None:
            self._rows.append(rows)
        self._reduced.append(plan)

    def _planned(self, made: list[_Made], shapes: list[torch.Size]) -> _Reduction:
        number = len(self._reduced)
        known = self._known[number] if number < len(self._known) else None
        if known is None or known.made != made or known.shapes != shapes:
            before = self._reduced[-1] if self._reduced else None
            known = _Reduction.of(self._recipe, made, shapes, before)
            self._known[number:] = [known]
        return known

    def _counted(self, scales: list[Tensor], plan: _Reduction) -> tuple[Tensor, Tensor | None]:
        """Counts of the scales by operand, int64 (operands, 256); and of fp32 scales, whose codes say only
        how they begin, see `_rows`.
        """
        device = scales[0].device
        kernel = host_kernels.scale_counts
        if kernel is not None:
            found = kernel(scales, plan.layout(device), plan.index(device, "slot_of"), len(plan.operands))
            if found is not None:
                return found
        scales = list(scales)
        for position in plan.cut:
            rows, columns, *_ = plan.grids[position]
            scales[position] = scales[position][:rows, :columns]
        flat = torch._C._nn.flatten_dense_tensors(scales)
        if plan.padded:
            flat = flat.index_select(0, plan.on(device, "positions", lambda: used_positions(plan.padded)))
        exact = None
        codes = flat
        if flat.dtype == torch.float32:
            exact = _rows(flat, plan.index(device, "lengths"))
            codes = flat.view(torch.int32).bitwise_right_shift(23).bitwise_and_(0xFF)
        return histogram(codes, plan.lengths, plan.slot_of, len(plan.operands), plan.on), exact


def _rows(scales: Tensor, lengths: Tensor) -> Tensor:
    """Maximum, minimum, sum, sum of squares and number of the fp32 scales of tensors.

    Args:
        scales: fp32 (n,), one tensor after the other.
        lengths: int64 (tensors,), scales of each.

    Returns:
        fp64 (tensors, 5).
    """
    exact = scales.double()
    columns = [
        torch.segment_reduce(data, reduce, lengths=lengths, unsafe=True)
        for reduce, data in (("max", exact), ("min", exact), ("sum", exact), ("sum", exact.square()))
    ]
    return torch.stack([*columns, lengths.double()], dim=1)


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
