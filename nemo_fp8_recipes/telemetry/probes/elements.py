"""The stats tier: every quantised tensor is read again and compared with the one it was made from.

This launches about 50 kernels a tensor and reads both tensors several times, or once where there is one of
`host_kernels`. It happens at the moment of quantisation: kept for later, activations would outlive their
layer, and what is written in place would be gone. What is done at the end of the step does not depend on how
many modules there are.
"""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_fp8_recipes.injection.operands import recipe_of
from nemo_fp8_recipes.telemetry import host_kernels
from nemo_fp8_recipes.telemetry.coded import Coded
from nemo_fp8_recipes.telemetry.elements import MEASURED, measure
from nemo_fp8_recipes.telemetry.groups import OneMatrix
from nemo_fp8_recipes.telemetry.linears import Operand
from nemo_fp8_recipes.telemetry.probes.base import SHARED_BY, Combine, Reading, ReadingSpec
from nemo_fp8_recipes.telemetry.probes.index import IndexCache
from nemo_fp8_recipes.telemetry.probes.parts import bulk_limit, values_between
from nemo_fp8_recipes.telemetry.probes.stored import in_order, stored, values

if TYPE_CHECKING:
    from nemo_fp8_recipes.telemetry.weights import MainCopy

__all__ = ["ElementProbe", "ElementSums"]

_SUMS = sum(how == "sum" for _, how in MEASURED)
_NORMS = ("norm", "noise", "bulk_norm", "bulk_noise")
_COMBINE: dict[str, Combine] = {
    **dict.fromkeys(_NORMS, "rms"),
    "nonfinite": "max",
    "largest": "max",
}


class ElementSums:
    """Measurements of the step's tensors, added up by operand at its end.

    The key of a measurement is the spec of its readings, but for their names; it combines as "parts" where
    other ranks measure other elements of the same tensor.
    """

    def __init__(self, indices: IndexCache) -> None:
        self._indices = indices
        self._slots: dict[ReadingSpec, int] = {}
        self._slot_of: list[int] = []
        self._rows: list[Tensor] = []

    def add(self, key: ReadingSpec, measured: Tensor) -> None:
        """One tensor's `measure`."""
        self._slot_of.append(self._slots.setdefault(key, len(self._slots)))
        self._rows.append(measured)

    def __contains__(self, key: ReadingSpec) -> bool:
        return key in self._slots

    def end(self) -> Reading | None:
        """Everything since the last call."""
        if not self._rows:
            return None
        rows = torch.stack(self._rows)
        slots = self._indices.on(rows.device, self._slot_of)
        size = len(self._slots)
        sums = rows.new_zeros((size, _SUMS)).index_add_(0, slots, rows[:, :_SUMS])
        first = [name for name, _ in MEASURED].index(_NORMS[0])
        sums[:, first : first + len(_NORMS)].sqrt_()
        largest = rows.new_zeros(size).scatter_reduce_(0, slots, rows[:, _SUMS], "amax")
        table = torch.cat([sums, largest[:, None]], dim=1).to(torch.float32)
        specs = _specs(tuple(self._slots))
        self._slots, self._slot_of, self._rows = {}, [], []
        return Reading(specs, table.reshape(-1))


@functools.lru_cache(maxsize=16)
def _specs(keys: tuple[ReadingSpec, ...]) -> tuple[ReadingSpec, ...]:
    """What is read of these operands: the same tuple for the same ones."""
    return tuple(key._replace(name=name, combine=_combine(key, name)) for key in keys for name, _ in MEASURED)


def _combine(key: ReadingSpec, name: str) -> Combine:
    if key.combine == "parts" and name == "nonfinite":
        return "parts"
    return _COMBINE.get(name, "mean")


def _on_host(source: Tensor, coded: Coded, used: Tensor | None) -> Tensor | None:
    """`measure` of the first `used` rows by the host's kernel; None where it does not do it."""
    kernel = host_kernels.measure
    if kernel is None or used is None:
        return kernel(source, coded) if kernel is not None else None
    if used.device.type != "cpu":
        return None
    rows = int(used)
    if not rows:
        return torch.zeros(len(MEASURED), dtype=torch.float64)
    some = coded._replace(codes=coded.codes[:rows])
    return kernel(source.reshape(-1, source.shape[-1])[:rows], some)


class ElementProbe:
    """Measures every quantised tensor of a step against its source."""

    def __init__(self, indices: IndexCache) -> None:
        self._indices = indices
        self.begin()

    def begin(self) -> None:
        self._sums = ElementSums(self._indices)
        self._columnwise: list[tuple[ReadingSpec, Tensor]] = []
        self._groups: dict[ReadingSpec, int] = {}
        """Which ranks share the weights of which this one measured a part."""

    def quantised(self, operand: Operand, quantizer: Any, tensor: Any, source: Tensor) -> None:
        """`quantizer` made `tensor` of `source`, of any shape with the same last dimension."""
        if source.numel() == 0:
            return  # an expert that got no token
        coded = stored(quantizer, tensor)
        if coded is None:
            return
        used = tensor.used_rows() if isinstance(tensor, OneMatrix) else None
        measured = _on_host(source, coded, used)
        if measured is None:
            found = values(coded, self._indices)
            measured = measure(source.reshape(found.values.shape), found.values, found.limit, used=used)
        self._add(ReadingSpec(*operand, "", recipe_of(quantizer), coded.format, "mean"), coded, measured)

    def kept(self, operand: Operand, quantizer: Any, weight: Any, copy: MainCopy) -> None:
        """The parameter `weight` was made of a high-precision copy, of which all or a part is here. Where
        ranks share such copies, what the bulk is follows from the codes, which are all here: it is the same,
        however this one is cut.
        """
        if not copy.sharded:
            self.quantised(operand, quantizer, weight, copy.values.reshape(weight.shape))
            return
        coded = stored(quantizer, weight)
        if coded is None:
            return
        coded = in_order(coded, self._indices)
        source, first = copy.values, copy.first
        bulk = bulk_limit(coded, self._indices)
        kernel = host_kernels.measure
        measured = kernel(source, coded, first, bulk) if kernel is not None else None
        if measured is None:
            found = values_between(coded, first, first + source.numel(), self._indices)
            measured = measure(source.reshape(found.values.shape), found.values, found.limit, bulk)
        shared = copy.group is not None
        spec = ReadingSpec(*operand, "", recipe_of(quantizer), coded.format, "parts" if shared else "mean")
        if copy.group is not None:
            self._groups[spec] = copy.group
        self._add(spec, coded, measured)

    def _add(self, spec: ReadingSpec, coded: Coded, measured: Tensor) -> None:
        if coded.rowwise:
            self._sums.add(spec, measured)
        else:
            self._columnwise.append((spec, measured))

    def end(self) -> Reading | None:
        # What was also quantised rowwise is counted as that, and not twice.
        alone = [(spec, measured) for spec, measured in self._columnwise if spec not in self._sums]
        for spec, measured in alone:
            self._sums.add(spec, measured)
        self._columnwise = []
        reading, groups = self._sums.end(), self._groups
        self._groups = {}
        if reading is None or not groups:
            return reading
        # Filled on the device, one run for each set of ranks: mostly there is one, and one for experts.
        ordered = sorted(groups, key=lambda spec: groups[spec])
        runs = [
            reading.values.new_full((sum(1 for _ in those),), float(group))
            for group, those in itertools.groupby(ordered, key=lambda spec: groups[spec])
        ]
        specs = tuple(spec._replace(name=SHARED_BY, combine="mean") for spec in ordered)
        return Reading((*reading.specs, *specs), torch.cat([reading.values, *runs]))
