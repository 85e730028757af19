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
        slots: int64 (operands,), in the concatenated buffers, on the device.
        operands: module, tensor and element format of each.
    """

    scales: list[Tensor]
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
        self._specs: tuple[list[_Owners], list[int], tuple[ReadingSpec, ...]] = ([], [], ())
        """Of whom what is read, and the lengths of their windows: the same tuple in steps that read the same.
        """
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
        key = tuple(id(scale) for scale in scales)
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
        # The windows behind all numbers: then they are one matrix on the host.
        values = [self._numbers(buffers, whose.slots) for buffers, whose in found]
        if self._history:
            values += self._windows(found)
        read, lengths = [one for _, one in found], [buffers.length for buffers, _ in found]
        before, of_length, specs = self._specs
        if of_length != lengths or not all(map(operator.is_, before, read)):
            specs = _specs(read, lengths if self._history else [])
            self._specs = (read, lengths, specs)
        return Reading(specs, torch.cat(values))

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
        return _Owners(
            buffers.scales,
            self._indices.on(buffers.scales[0].device, [slot for _, _, slot in found]),
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

    def _numbers(self, buffers: _Buffers, slots: Tensor) -> Tensor:
        """`_NUMBERS` of some slots, fp32 (len(_NUMBERS) * len(slots),)."""
        assert buffers.amax is not None  # a buffer is created by its first update
        vectors = {
            "amax": buffers.amax,
            "scale": buffers.scale,
            "scale_next": stacked_rows(buffers.scales, 0),
            "peak": buffers.peak,
        }
        return torch.stack([vectors[name] for name, _ in _NUMBERS]).index_select(1, slots).reshape(-1)


_NUMBERS: tuple[tuple[str, Combine], ...] = (
    ("amax", "max"),
    ("scale", "min"),
    ("scale_next", "min"),
    ("peak", "max"),
)
"""What is read of each operand beside its window, and how ranks combine it."""


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
