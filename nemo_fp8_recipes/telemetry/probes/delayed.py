"""Delayed scaling: the global scale and history buffers, at the moment Transformer Engine updates them.

`FP8GlobalStateManager.reduce_and_update_fp8_tensors` concatenates the live amax (history row 0) of all
modules, reduces it over ranks and updates history and scale in one call: the forward direction when the
outermost autocast exits, the backward one after the backward pass of the module that ran first, each once a
micro-batch. The probe stands around that call, so it knows which amax was observed under which scale, without
guessing from the state afterwards.

An update, per tensor (`common/recipe/delayed_scaling.cu`), with a the reduced amax and h the history before
it:

    a == 0:  nothing changes: no roll, the old scale stays
    else:    window = h[1], ..., h[len-1], a;  h <- 0, window[1], ..., window[len-1]
             m = max(window) ("max") or a ("most_recent")
             scale <- min(fp8_max * 2^-margin / m, FLT_MAX) if m is finite and above 0, else the old scale

`amax_history` is that window: it includes the oldest entry, which counts for the scale and is then dropped,
so that the next scale can be computed from it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_fp8_recipes.telemetry import host_kernels
from nemo_fp8_recipes.telemetry.linears import Linear
from nemo_fp8_recipes.telemetry.probes.base import Combine, Probe, Reading, ReadingSpec, element_format
from nemo_fp8_recipes.telemetry.probes.index import IndexCache

__all__ = ["DelayedProbe"]


class _Buffers:
    """One direction's buffers and what the step's updates did to them. All vectors are fp32 (slots,).

    Attributes:
        histories: per module, fp32 (len, slots of the module).
        scales: per module, fp32 (slots of the module).
        amax: largest reduced amax of the step's updates.
        last: reduced amax of the last update in which it was not zero.
        scale: the scale in force before that update: what the tensor was cast with.
        oldest: the history entry that that update dropped.
        peak: largest amax x scale of the step's updates: what the largest element became before it was
            clipped at fp8_max.
    """

    def __init__(self, histories: Sequence[Tensor], scales: Sequence[Tensor]) -> None:
        self.histories = list(histories)
        self.scales = list(scales)
        self.amax: Tensor | None = None
        self.last: Tensor
        self.scale: Tensor
        self.oldest: Tensor
        self.peak: Tensor

    @property
    def length(self) -> int:
        return int(self.histories[0].shape[0])

    def update(self, amax: Tensor, scale: Tensor, oldest: Tensor) -> None:
        peak = amax * scale
        if self.amax is None:
            self.amax, self.last, self.scale, self.oldest, self.peak = amax, amax, scale, oldest, peak
            return
        self.peak = torch.maximum(self.peak, peak)
        # A weight is cast in the first micro-batch only: in the others its amax is 0 and its state stays.
        observed = amax != 0
        self.amax = torch.maximum(self.amax, amax)
        self.last = torch.where(observed, amax, self.last)
        self.scale = torch.where(observed, scale, self.scale)
        self.oldest = torch.where(observed, oldest, self.oldest)


def stacked_rows(tensors: Sequence[Tensor], row: int) -> Tensor:
    """A row of each of them, one after the other; a vector is one row."""
    kernel = host_kernels.stacked_rows
    found = kernel(tensors, row) if kernel is not None else None
    if found is None:
        vectors = [tensor.select(0, row) if tensor.dim() > 1 else tensor for tensor in tensors]
        found = torch.cat(vectors)
    return found


def history_windows(histories: Sequence[Tensor], oldest: Tensor, last: Tensor, slots: Tensor) -> Tensor:
    """The windows behind the last updates.

    Args:
        histories: per module, fp32 (len, slots of the module), after the update.
        oldest: fp32 (all slots,), the entry that the update dropped.
        last: fp32 (all slots,), the amax it brought.
        slots: int64 (n,), those that are wanted.

    Returns:
        fp32 (n * len,), one window after the other.
    """
    last = last.index_select(0, slots)[None]
    if histories[0].shape[0] == 1:
        return last.reshape(-1)
    history = torch.cat(list(histories), dim=1).index_select(1, slots)
    rolled = torch.cat([oldest.index_select(0, slots)[None], history[1:-1], last])
    return torch.where(last == 0, torch.cat([history[1:], last]), rolled).t().reshape(-1)


class _Owners(NamedTuple):
    """Whose slots the buffers of one direction hold: the same in every step with the same buffers.

    Attributes:
        scales: the buffers, kept so that their ids stay their own.
        places: slot of each operand in the concatenated buffers.
        slots: the same, int64 (operands,) on the device.
        operands: module, tensor and element format of each.
    """

    scales: list[Tensor]
    places: list[int]
    slots: Tensor
    operands: tuple[tuple[str, str, str], ...]


class DelayedProbe(Probe):
    """Scale, amax and history window of every operand at the step's updates.

    Args:
        linears: the GEMMs of the model.
        indices: index tensors on the device.
        history: whether to read the windows.
    """

    def __init__(self, linears: Sequence[Linear], indices: IndexCache, *, history: bool) -> None:
        self._linears = linears
        self._indices = indices
        self._history = history
        self._owners: dict[tuple[int, ...], _Owners] = {}
        self._plan: _Plan | None = None
        """Of the last step that read something."""
        self.begin()

    def begin(self) -> None:
        self._buffers: dict[tuple[int, ...], _Buffers] = {}

    def fused_update(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Around the binding's `fused_amax_and_scale_update_after_reduction`."""

        def call(
            amax: Tensor, histories: Sequence[Tensor], scales: Sequence[Tensor], *args: Any, **kwargs: Any
        ) -> Any:
            self._before_update(amax, histories, scales)
            return original(amax, histories, scales, *args, **kwargs)

        return call

    def unfused_update(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Around `quantization._amax_and_scale_update`, the path of NVTE_UNFUSED_FP8_UPDATE and of callables
        as algorithms. Transformer Engine calls it once a module, with the reduced amax in history row 0.
        """

        def call(history: Tensor, scale: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._before_update(history[0].clone(), [history], [scale])
            return original(history, scale, *args, **kwargs)

        return call

    def _before_update(self, amax: Tensor, histories: Sequence[Tensor], scales: Sequence[Tensor]) -> None:
        key = tuple(map(id, scales))
        buffers = self._buffers.get(key)
        if buffers is None:
            buffers = self._buffers[key] = _Buffers(histories, scales)
        # The next entry to be dropped is row 1: row 0 is the live amax. A window of one holds nothing older.
        oldest = 1 if buffers.length > 1 else 0
        with torch.no_grad():
            buffers.update(amax, stacked_rows(scales, 0), stacked_rows(histories, oldest))

    def end(self) -> Reading | None:
        if not self._buffers:
            return None
        owners = {}
        found = []
        for key, buffers in self._buffers.items():
            known = self._owners.get(key)
            whose = owners[key] = known if known is not None else self._find(buffers)
            if whose.operands:
                found.append((buffers, whose))
        self._owners = owners  # those of the buffers that are no more go
        self.begin()
        if not found:
            return None
        lengths = [buffers.length for buffers, _ in found]
        plan = self._plan
        if (
            plan is None
            or plan.lengths != lengths
            or not all(map(operator.is_, plan.read, (o for _, o in found)))
        ):
            plan = self._plan = self._planned(found, lengths)
        # The windows behind all numbers: then they are one matrix on the host.
        values = [self._numbers([buffers for buffers, _ in found], plan.numbers)]
        if self._history:
            values += self._windows(found)
        return Reading(plan.specs, torch.cat(values))

    def _planned(self, found: Sequence[tuple[_Buffers, _Owners]], lengths: list[int]) -> _Plan:
        """What follows from whom what is read of, and from the lengths of their windows."""
        read = [whose for _, whose in found]
        sizes = [sum(scale.numel() for scale in whose.scales) for whose in read]
        numbers: list[int] = []
        begin = 0
        for number, (whose, size) in enumerate(zip(read, sizes, strict=True)):
            behind = len(_KEPT) * sum(sizes) + sum(sizes[:number])
            for name, _ in _NUMBERS:
                first = begin + _KEPT.index(name) * size if name in _KEPT else behind
                numbers += [first + place for place in whose.places]
            begin += len(_KEPT) * size
        device = read[0].scales[0].device
        specs = _specs(read, lengths if self._history else [])
        return _Plan(read, lengths, self._indices.on(device, numbers), specs)

    def _find(self, buffers: _Buffers) -> _Owners:
        columns: dict[int, list[tuple[Linear, str, int]]] = {}
        for linear in self._linears:
            for tensor, scale, column in linear.scale_columns():
                columns.setdefault(id(scale), []).append((linear, tensor, column))
        start = 0
        found: list[tuple[Linear, str, int]] = []
        for scale in buffers.scales:
            found.extend(
                (linear, tensor, start + column) for linear, tensor, column in columns.get(id(scale), ())
            )
            start += scale.numel()
        formats: dict[tuple[str, str], str] = {}
        for path, linear in {linear.path: linear for linear, _, _ in found}.items():
            for tensor, quantizer in linear.quantizers():
                formats[path, tensor] = element_format(quantizer)
        places = [slot for _, _, slot in found]
        return _Owners(
            buffers.scales,
            places,
            self._indices.on(buffers.scales[0].device, places),
            tuple((linear.path, tensor, formats[linear.path, tensor]) for linear, tensor, _ in found),
        )

    def _windows(self, found: Sequence[tuple[_Buffers, _Owners]]) -> list[Tensor]:
        kernel = host_kernels.history_windows
        windows = []
        for buffers, whose in found:
            given = (buffers.histories, buffers.oldest, buffers.last, whose.slots)
            made = kernel(*given) if kernel is not None else None
            windows.append(made if made is not None else history_windows(*given))
        return windows

    def _numbers(self, found: Sequence[_Buffers], places: Tensor) -> Tensor:
        """`_NUMBERS` of the slots that are read, fp32 (n,).

        Args:
            places: int64 (n,), see `_Plan.numbers`.
        """
        kept = [getattr(buffers, name) for buffers in found for name in _KEPT]
        after = stacked_rows([scale for buffers in found for scale in buffers.scales], 0)
        return torch.cat([*kept, after]).index_select(0, places)


class _Plan(NamedTuple):
    """What follows from the buffers of a step: the same in every step that reads the same.

    Attributes:
        read: whose slots they hold.
        lengths: of their windows.
        numbers: int64 on the device, where what is read lies among `_KEPT` of each of them and, behind these,
            the scales of all.
        specs: what is read.
    """

    read: list[_Owners]
    lengths: list[int]
    numbers: Tensor
    specs: tuple[ReadingSpec, ...]


_NUMBERS: tuple[tuple[str, Combine], ...] = (
    ("amax", "max"),
    ("scale", "min"),
    ("scale_next", "min"),
    ("peak", "max"),
)
"""What is read of each operand beside its window, and how ranks combine it."""

_KEPT = ("amax", "scale", "peak")
"""Those of them that `_Buffers` has; the others are the scales after the updates."""


def _specs(read: Sequence[_Owners], lengths: Sequence[int]) -> tuple[ReadingSpec, ...]:
    """What is read, in order.

    Args:
        lengths: of the windows of each of `read`; empty where they are not read.
    """
    numbers = [
        ReadingSpec(module, tensor, name, "delayed", fmt, combine)
        for whose in read
        for name, combine in _NUMBERS
        for module, tensor, fmt in whose.operands
    ]
    windows = [
        ReadingSpec(module, tensor, "amax_history", "delayed", fmt, "max", length=length)
        for whose, length in zip(read, lengths, strict=False)
        for module, tensor, fmt in whose.operands
    ]
    return (*numbers, *windows)
