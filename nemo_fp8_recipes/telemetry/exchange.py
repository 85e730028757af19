"""From device vectors on every rank to numbers on the writing rank: one collective and one copy a logging
step.

The ranks agree once on a layout, the sorted union of what each of them reads, so that a rank that lacks a
module (another pipeline stage, an expert elsewhere) still takes part. Each rank writes what it has into its
places and leaves the others empty; one all-reduce with the maximum then gives every rank the whole.

That the maximum also serves minima, means and NaN is a matter of encoding: an fp32 becomes the int32 of the
same order, with NaN above +Inf; a minimum is stored complemented; a mean has a place for each rank, and every
rank's own number counts once, or as often as it has blocks; the scale of delayed scaling, on which the ranks
should agree, has a place for its minimum and one for its maximum. Integers reduce the same way in NCCL
and gloo, whose floating-point maxima differ on NaN.

Place 0 says whether a rank read something the layout does not have yet. Then, and in the first logging step,
the ranks gather their lists anew. Steps of another kind, which read more, have a layout of their own, so that
the others do not carry its empty places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_fp8_recipes.telemetry.found import Found
from nemo_fp8_recipes.telemetry.probes.base import COUNT, WEIGHED, Reading, ReadingSpec

__all__ = ["Exchange", "InFlight", "decode", "encode"]

T = TypeVar("T")

RANGED = "scale"
"""The minimum that is taken with its maximum, `scale_max`; that is given where the two differ."""

_ABSENT = -(2**31)
_NAN = 2**31 - 1
_AVERAGES = ("mean", "rms")
_MAX_SELECTIONS = 64


def encode(values: Tensor, minimum: Tensor) -> Tensor:
    """int32 codes of fp32 values, in the order of the values; complemented where `minimum`, so that the
    largest code is the smallest value. NaN is the largest code of both.
    """
    bits = values.view(torch.int32)
    ordered = bits ^ (bits.bitwise_right_shift(31) & 0x7FFFFFFF)
    ordered = torch.where(minimum, ~ordered, ordered)
    return torch.where(values.isnan(), _NAN, ordered)


def decode(codes: np.ndarray, minimum: np.ndarray) -> np.ndarray:
    """fp32 values of int32 codes; an empty place becomes NaN, see `decode`'s callers for telling it apart."""
    ordered = np.where(minimum, ~codes, codes) if minimum.any() else codes
    bits = ordered >> 31
    bits &= 0x7FFFFFFF
    bits ^= ordered
    values = bits.view(np.float32)
    # The codes of NaN and of an empty place are those of some NaN already.
    np.copyto(values, np.float32("nan"), where=np.isnan(values))
    return values


@dataclass(frozen=True)
class _Layout:
    """Which place holds what, the same on every rank.

    Attributes:
        specs: everything any rank reads, sorted.
        starts: first place of each spec; place 0 is the flag.
        size: places.
        minimum: bool (size,), where the smallest value wins.
        averages: the specs whose ranks are averaged; they have a place for each rank.
        rooted: bool (averages,), where it is the root of the mean square.
        average_places: int64 (averages, ranks).
        weighed: int64 (2, weighed averages): positions among `averages` of those that are weighed, and of
            their weights.
        others: the other specs.
        other_places: int64 (others,), the first place of each.
        ranged: int64, positions among `others` of those with a minimum and a maximum.
        selections: what was found of it in earlier steps, see `selection`.
    """

    specs: tuple[ReadingSpec, ...]
    starts: dict[ReadingSpec, int]
    size: int
    minimum: np.ndarray
    averages: tuple[ReadingSpec, ...]
    rooted: np.ndarray
    average_places: np.ndarray
    weighed: np.ndarray
    others: tuple[ReadingSpec, ...]
    other_places: np.ndarray
    ranged: np.ndarray
    selections: dict[bytes, _Selection] = field(default_factory=dict)

    @classmethod
    def of(cls, specs: Sequence[ReadingSpec], world_size: int) -> _Layout:
        ordered = tuple(sorted(set(specs)))
        starts, place = {}, 1
        for spec in ordered:
            starts[spec] = place
            if spec.combine in _AVERAGES:
                place += world_size
            else:
                place += spec.length * (2 if _ranged(spec) else 1)
        minimum = np.zeros(place, dtype=bool)
        for spec in ordered:
            if spec.combine == "min":
                minimum[starts[spec] : starts[spec] + spec.length] = True
        averages = tuple(spec for spec in ordered if spec.combine in _AVERAGES)
        rooted = np.asarray([spec.combine == "rms" for spec in averages], dtype=bool)
        first = np.asarray([starts[spec] for spec in averages], dtype=np.int64)
        position = {spec: index for index, spec in enumerate(averages)}
        weights = [
            (position[spec], position[count])
            for spec in averages
            if spec.name in WEIGHED and (count := spec._replace(name=COUNT, combine="mean")) in position
        ]
        others = tuple(spec for spec in ordered if spec.combine not in _AVERAGES)
        return cls(
            ordered,
            starts,
            place,
            minimum,
            averages,
            rooted,
            first[:, None] + np.arange(world_size),
            np.asarray(weights, dtype=np.int64).reshape(-1, 2).T,
            others,
            np.asarray([starts[spec] for spec in others], dtype=np.int64),
            np.asarray([index for index, spec in enumerate(others) if _ranged(spec)], dtype=np.int64),
        )

    def found(self, places: np.ndarray) -> Found:
        """The values in the places; specs that no rank had are left out."""
        values = decode(places, self.minimum)
        mean, averaged = self._averaged(places, values)
        present = places[self.other_places] != _ABSENT
        smallest = self.other_places[self.ranged]
        differs = present[self.ranged] & (values[smallest] != values[smallest + 1])
        key = np.concatenate([averaged, present, differs]).tobytes()
        selection = self.selections.get(key)
        if selection is None:
            if len(self.selections) >= _MAX_SELECTIONS:
                self.selections.clear()
            selection = self.selections[key] = self._selection(averaged, present, differs)
        windows = {spec: values[place : place + spec.length] for spec, place in selection.windows}
        return Found(selection.specs, np.concatenate([values, mean])[selection.positions], windows)

    def _selection(self, averaged: np.ndarray, present: np.ndarray, differs: np.ndarray) -> _Selection:
        """What is there, from bool (averages,), (others,) and (ranged,)."""
        there = [(self.averages[index], self.size + index) for index in np.flatnonzero(averaged).tolist()]
        apart = set(self.ranged[differs].tolist())
        for index in np.flatnonzero(present).tolist():
            spec, place = self.others[index], int(self.other_places[index])
            there.append((spec, place))
            if index in apart:
                largest = spec._replace(name=f"{spec.name}_max", combine="max")
                there.append((largest, place + spec.length))
        numbers = [(spec, place) for spec, place in there if spec.length == 1]
        return _Selection(
            tuple(spec for spec, _ in numbers),
            np.asarray([place for _, place in numbers], dtype=np.int64),
            tuple((spec, place) for spec, place in there if spec.length != 1),
        )

    def _averaged(self, places: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The averages over the ranks that have a value, fp64 inside, as fp32 (averages,); and which of them
        any rank has.
        """
        here = values[self.average_places].astype(np.float64)
        present = places[self.average_places] != _ABSENT
        weights = present.astype(np.float64)
        weighed, by = self.weighed
        counts = np.where(present[by], here[by], 0.0)
        # Where no rank has a block that counts there is nothing to weigh.
        weights[weighed] *= np.where(counts.sum(axis=1, keepdims=True) > 0, counts, 1.0)
        powers = np.where(self.rooted[:, None], np.square(here), here)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.where(weights > 0, powers * weights, 0.0).sum(axis=1) / weights.sum(axis=1)
            mean = np.where(self.rooted, np.sqrt(mean), mean).astype(np.float32)
        return mean, present.any(axis=1)


@dataclass(frozen=True)
class _Selection:
    """The part of a layout that a step had: the same in most steps.

    Attributes:
        specs: those of one number.
        positions: int64 (specs,), where it is in the places and, after them, the averages.
        windows: the longer ones, each with its first place.
    """

    specs: tuple[ReadingSpec, ...]
    positions: np.ndarray
    windows: tuple[tuple[ReadingSpec, int], ...]


@dataclass(frozen=True)
class _Plan:
    """Where a reading's numbers go.

    Attributes:
        places: places in the layout, int64 (n,).
        source: positions in the reading, int64 (n,).
        minimum: where the smallest value wins, bool (n,).
        unknown: the reading holds something the layout has no place for.
        whole: `source` is the reading as it is.
    """

    places: np.ndarray
    source: np.ndarray
    minimum: np.ndarray
    unknown: bool
    whole: bool
    _device: dict[tuple[torch.device, str], Tensor] = field(default_factory=dict)

    def on(self, device: torch.device, name: str) -> Tensor:
        """An attribute on the device; uploaded once."""
        tensor = self._device.get((device, name))
        if tensor is None:
            array = torch.from_numpy(getattr(self, name))
            tensor = self._device[device, name] = array.to(device, non_blocking=True)
        return tensor


class InFlight:
    """Values of one logging step on their way to the host. `result` waits for them."""

    def __init__(
        self, exchange: Exchange, kind: str, reading: Reading | None, host: Tensor, event: Any | None
    ) -> None:
        self._exchange = exchange
        self._kind = kind
        self._reading = reading
        self._host = host
        self._event = event

    def result(self, *, collective: bool = True) -> Found:
        """What all ranks read in the step: fp32 (length,) for each spec. Empty on ranks that do not write.

        Args:
            collective: whether all ranks call this now. If not, what a rank read for the first time is left
            out.
        """
        if self._event is not None:
            self._event.synchronize()
        host = self._host.numpy()
        if host[0] and collective:
            return self._exchange.combine_anew(self._reading, self._kind)
        return self._exchange.take(host, self._kind)


class Exchange:
    """Combines readings over ranks.

    Args:
        group: process group; None is the default group where torch.distributed runs, else a single process.
        writer: whether this rank wants the result.
    """

    def __init__(self, group: Any | None, *, writer: bool) -> None:
        self._group = group
        self._distributed = dist.is_available() and dist.is_initialized()
        self.world_size = self._world_size = dist.get_world_size(group) if self._distributed else 1
        self.rank = self._rank = dist.get_rank(group) if self._distributed else 0
        self._writer = writer
        self._known: dict[str, set[ReadingSpec]] = {}
        self._last: dict[str, tuple[ReadingSpec, ...]] = {}
        self._layouts: dict[str, _Layout] = {}
        self._plans: dict[int, tuple[_Layout, tuple[ReadingSpec, ...], _Plan]] = {}
        self._source: int | None = None

    @property
    def alone(self) -> bool:
        """There is one rank only."""
        return self._world_size == 1

    def start(self, reading: Reading | None, device: torch.device, *, kind: str = "") -> InFlight:
        """Reduce over ranks and start the copy to the host. Every rank calls this in every logging step, also
        with nothing to show.

        Args:
            reading: what this rank read.
            device: where the model is.
            kind: of the step, the same on every rank; steps of one kind read the same things.
        """
        specs = reading.specs if reading is not None else ()
        if self._last.get(kind) is not specs:
            self._known.setdefault(kind, set()).update(specs)
            self._last[kind] = specs
        layout = self._layouts.get(kind)
        if layout is None:
            layout = self._agree(kind)
        places = self._reduce(layout, reading, device)
        if not self._writer:
            places = places[:1]
        if places.device.type == "cpu" or torch.cuda.is_current_stream_capturing():
            return InFlight(self, kind, reading, places, None)
        host = torch.empty(places.shape, dtype=places.dtype, pin_memory=True)
        host.copy_(places, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return InFlight(self, kind, reading, host, event)

    def combine_anew(self, reading: Reading | None, kind: str) -> Found:
        """Agree on a layout that holds everything, and combine with it. Every rank calls this together."""
        layout = self._agree(kind)
        device = reading.values.device if reading is not None else self._device()
        return self.take(self._reduce(layout, reading, device).cpu().numpy(), kind)

    def same_everywhere(self, value: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
        """The writer's `value` on every rank; collective. Where it is empty, as it mostly is, this costs one
        broadcast of one number; `value` must be picklable.
        """
        if self._world_size == 1:
            return value
        if self._source is None:
            self._source = self._writing_rank(device)
        count = torch.tensor([len(value) if self._writer else 0], dtype=torch.int32, device=device)
        dist.broadcast(count, self._source, group=self._group)
        if not int(count):
            return ()
        given = [value if self._writer else None]
        dist.broadcast_object_list(given, self._source, group=self._group)
        return tuple(given[0] or ())

    def of_all_ranks(self, mine: T) -> list[T]:
        """What each rank has, by rank; collective. `mine` must be picklable."""
        if self._world_size == 1:
            return [mine]
        found: list[Any] = [None] * self._world_size
        dist.all_gather_object(found, mine, group=self._group)
        return found

    def _writing_rank(self, device: torch.device) -> int:
        """The first rank that writes, as torch.distributed counts it. Collective."""
        mine = torch.tensor(
            [self._rank if self._writer else self._world_size], dtype=torch.int32, device=device
        )
        dist.all_reduce(mine, op=dist.ReduceOp.MIN, group=self._group)
        rank = int(mine) % self._world_size  # nobody writes: rank 0 says that there is nothing
        return rank if self._group is None else int(dist.get_global_rank(self._group, rank))

    def take(self, places: np.ndarray, kind: str) -> Found:
        """The values in the places of the layout; specs that no rank had in this step are left out."""
        layout = self._layouts.get(kind)
        if layout is None or not self._writer:
            return Found.nothing()
        return layout.found(places)

    def _agree(self, kind: str) -> _Layout:
        known = self._known[kind]
        specs = sorted(known)
        if self._world_size > 1:
            gathered: list[Any] = [None] * self._world_size
            dist.all_gather_object(gathered, specs, group=self._group)
            specs = [ReadingSpec(*spec) for rank in gathered for spec in rank]
        known.update(specs)
        self._layouts[kind] = _Layout.of(specs, self._world_size)
        return self._layouts[kind]

    def _reduce(self, layout: _Layout, reading: Reading | None, device: torch.device) -> Tensor:
        places = torch.full((layout.size,), _ABSENT, dtype=torch.int32, device=device)
        if reading is not None:
            plan = self._plan_for(layout, reading)
            values = reading.values
            if not plan.whole:
                values = values.index_select(0, plan.on(device, "source"))
            places.index_copy_(0, plan.on(device, "places"), encode(values, plan.on(device, "minimum")))
            if plan.unknown:
                places[:1].fill_(1)
            else:
                places[:1].zero_()
        if self._world_size > 1:
            dist.all_reduce(places, op=dist.ReduceOp.MAX, group=self._group)
        return places

    def _plan_for(self, layout: _Layout, reading: Reading) -> _Plan:
        """Where this rank's numbers go. The same in every step that reads the same."""
        planned = self._plans.get(id(layout))
        if planned is not None and planned[0] is layout and planned[1] == reading.specs:
            return planned[2]
        places, source, minimum = [], [], []
        position, unknown = 0, False
        for spec in reading.specs:
            start = layout.starts.get(spec)
            if start is None:
                unknown = True
            else:
                start += self._rank if spec.combine in _AVERAGES else 0
                places.append(np.arange(start, start + spec.length))
                source.append(np.arange(position, position + spec.length))
                minimum.append(np.full(spec.length, spec.combine == "min"))
                if _ranged(spec):
                    places.append(places[-1] + spec.length)
                    source.append(source[-1])
                    minimum.append(np.zeros(spec.length, dtype=bool))
            position += spec.length
        taken = _joined(source)
        whole = len(taken) == position and bool((taken == np.arange(position)).all())
        plan = _Plan(_joined(places), taken, _joined(minimum).astype(bool), unknown, whole)
        # Layouts that were replaced by a larger one go.
        self._plans = {
            id(kept): self._plans[id(kept)] for kept in self._layouts.values() if id(kept) in self._plans
        }
        self._plans[id(layout)] = (layout, reading.specs, plan)
        return plan

    def _device(self) -> torch.device:
        backend = dist.get_backend(self._group) if self._distributed else "gloo"
        return torch.device("cuda") if backend == "nccl" else torch.device("cpu")


def _ranged(spec: ReadingSpec) -> bool:
    return spec.name == RANGED and spec.combine == "min"


def _joined(pieces: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.int64), *pieces])
