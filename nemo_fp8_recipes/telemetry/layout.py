"""Which place holds which number of all that the ranks read: the same on every rank.

The layout is the sorted union of what each of them reads, windows behind the numbers, so that a rank that
lacks a module (another pipeline stage, an expert elsewhere) has its places too, and leaves them empty. A mean
has a place for each rank, and every rank's own number counts once, or as often as it has blocks; the scale of
delayed scaling, on which the ranks should agree, has a place for its minimum and one for its maximum. What
ranks counted of their parts of an operand has a place for each of them, too. Place 0 says whether a rank read
something that the layout does not have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from nemo_fp8_recipes.telemetry.codec import ABSENT, decode
from nemo_fp8_recipes.telemetry.found import Found
from nemo_fp8_recipes.telemetry.probes.base import COUNT, SHARED_BY, WEIGHED, ReadingSpec
from nemo_fp8_recipes.telemetry.rows import Rows

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AVERAGES", "Layout", "Plan"]

RANGED = "scale"
"""The minimum that is taken with its maximum, `scale_max`; that is given where the two differ."""

AVERAGES = ("mean", "rms", "parts")
"""What is combined on the host, of the numbers of all ranks."""

_MAX_SELECTIONS = 64


@dataclass(frozen=True)
class Layout:
    """Which place holds what, the same on every rank.

    Attributes:
        specs: everything any rank reads, sorted, windows last.
        starts: first place of each spec; place 0 is the flag.
        size: places.
        minimum: bool (size,), where the smallest value wins.
        averages: the specs whose ranks are averaged, or added up in parts; they have a place for each rank.
        rooted: bool (averages,), where it is the root of the mean square.
        average_places: int64 (averages, ranks).
        weighed: int64 (2, weighed averages): positions among `averages` of those that are weighed, and of
            their weights.
        shared: int64 (2, averages in parts): positions of those, and of what says which ranks share them.
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
    shared: np.ndarray
    others: tuple[ReadingSpec, ...]
    other_places: np.ndarray
    ranged: np.ndarray
    selections: dict[bytes, Selection] = field(default_factory=dict)

    @classmethod
    def of(cls, specs: Sequence[ReadingSpec], world_size: int) -> Layout:
        ordered = tuple(sorted(set(specs), key=_numbers_first))
        starts, place = {}, 1
        for spec in ordered:
            starts[spec] = place
            if spec.combine in AVERAGES:
                place += world_size
            else:
                place += spec.length * (2 if _ranged(spec) else 1)
        minimum = np.zeros(place, dtype=bool)
        for spec in ordered:
            if spec.combine == "min":
                minimum[starts[spec] : starts[spec] + spec.length] = True
        averages = tuple(spec for spec in ordered if spec.combine in AVERAGES)
        rooted = np.asarray([spec.combine == "rms" for spec in averages], dtype=bool)
        first = np.asarray([starts[spec] for spec in averages], dtype=np.int64)
        position = {spec: index for index, spec in enumerate(averages)}
        weights = [
            (position[spec], position[count])
            for spec in averages
            if spec.name in WEIGHED and (count := spec._replace(name=COUNT, combine="mean")) in position
        ]
        parts = [
            (position[spec], position[by])
            for spec in averages
            if spec.combine == "parts" and (by := spec._replace(name=SHARED_BY, combine="mean")) in position
        ]
        others = tuple(spec for spec in ordered if spec.combine not in AVERAGES)
        return cls(
            ordered,
            starts,
            place,
            minimum,
            averages,
            rooted,
            first[:, None] + np.arange(world_size),
            np.asarray(weights, dtype=np.int64).reshape(-1, 2).T,
            np.asarray(parts, dtype=np.int64).reshape(-1, 2).T,
            others,
            np.asarray([starts[spec] for spec in others], dtype=np.int64),
            np.asarray([index for index, spec in enumerate(others) if _ranged(spec)], dtype=np.int64),
        )

    def found(self, places: np.ndarray) -> Found:
        """The values in the places; specs that no rank had are left out."""
        values = decode(places, self.minimum)
        mean, averaged = self._averaged(places, values)
        present = places[self.other_places] != ABSENT
        smallest = self.other_places[self.ranged]
        differs = present[self.ranged] & (values[smallest] != values[smallest + 1])
        key = np.concatenate([averaged, present, differs]).tobytes()
        selection = self.selections.get(key)
        if selection is None:
            if len(self.selections) >= _MAX_SELECTIONS:
                self.selections.clear()
            selection = self.selections[key] = self._selection(averaged, present, differs)
        return selection.found(values, mean)

    def _selection(self, averaged: np.ndarray, present: np.ndarray, differs: np.ndarray) -> Selection:
        """What is there, from bool (averages,), (others,) and (ranged,)."""
        there = [(self.averages[index], self.size + index) for index in np.flatnonzero(averaged).tolist()]
        apart = set(self.ranged[differs].tolist())
        for index in np.flatnonzero(present).tolist():
            spec, place = self.others[index], int(self.other_places[index])
            there.append((spec, place))
            if index in apart:
                largest = spec._replace(name=f"{spec.name}_max", combine="max")
                there.append((largest, place + spec.length))
        return Selection.of(there)

    def _averaged(self, places: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The averages over the ranks that have a value, fp64 inside, as fp32 (averages,); and which of them
        any rank has.
        """
        here = values[self.average_places].astype(np.float64)
        present = places[self.average_places] != ABSENT
        weights = present.astype(np.float64)
        weighed, by = self.weighed
        counts = np.where(present[by], here[by], 0.0)
        # Where no rank has a block that counts there is nothing to weigh.
        weights[weighed] *= np.where(counts.sum(axis=1, keepdims=True) > 0, counts, 1.0)
        powers = np.where(self.rooted[:, None], np.square(here), here)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.where(weights > 0, powers * weights, 0.0).sum(axis=1) / weights.sum(axis=1)
            mean = np.where(self.rooted, np.sqrt(mean), mean).astype(np.float32)
        parts, by = self.shared
        if len(parts):
            mean[parts] = _largest_sum(np.where(present[parts], here[parts], 0.0), here[by])
        return mean, present.any(axis=1)


@dataclass(frozen=True)
class Selection:
    """The part of a layout that a step had: the same in most steps.

    Attributes:
        specs: those of one number.
        positions: int64 (specs,), where it is in the places and, after them, the averages.
        windows: the longer ones, in the order of their places.
        window_places: the first place of each of them.
        matrix: they are of one length and lie one after the other.
    """

    specs: tuple[ReadingSpec, ...]
    positions: np.ndarray
    windows: tuple[ReadingSpec, ...]
    window_places: tuple[int, ...]
    matrix: bool

    @classmethod
    def of(cls, there: Sequence[tuple[ReadingSpec, int]]) -> Selection:
        """Of readings and their first places."""
        numbers = [(spec, place) for spec, place in there if spec.length == 1]
        windows = sorted(((spec, place) for spec, place in there if spec.length != 1), key=lambda one: one[1])
        places = tuple(place for _, place in windows)
        length = windows[0][0].length if windows else 0
        return cls(
            tuple(spec for spec, _ in numbers),
            np.asarray([place for _, place in numbers], dtype=np.int64),
            tuple(spec for spec, _ in windows),
            places,
            bool(windows)
            and all(spec.length == length for spec, _ in windows)
            and places == tuple(range(places[0], places[0] + length * len(places), length)),
        )

    def found(self, values: np.ndarray, more: np.ndarray | None = None) -> Found:
        """What it selects of fp32 values, and of `more` behind them."""
        windows: Mapping[ReadingSpec, np.ndarray]
        if self.matrix:
            first, length = self.window_places[0], self.windows[0].length
            end = first + length * len(self.windows)
            windows = Rows(self.windows, values[first:end].reshape(-1, length))
        else:
            windows = {
                spec: values[place : place + spec.length]
                for spec, place in zip(self.windows, self.window_places, strict=True)
            }
        everything = values if more is None else np.concatenate([values, more])
        return Found(self.specs, everything[self.positions], windows)


@dataclass(frozen=True)
class Plan:
    """Where a reading's numbers go.

    Attributes:
        specs: what the reading is of.
        places: places in the layout, int64 (n,).
        source: positions in the reading, int64 (n,).
        minimum: where the smallest value wins, bool (n,).
        unknown: the reading holds something the layout has no place for.
        whole: `source` is the reading as it is.
        flag: what place 0 says, int32 (1,).
        alone: what there is in the reading as it is, which a process alone has no places for.
    """

    specs: tuple[ReadingSpec, ...]
    places: np.ndarray
    source: np.ndarray
    minimum: np.ndarray
    unknown: bool
    whole: bool
    flag: np.ndarray
    alone: Selection
    _device: dict[tuple[torch.device, str], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, layout: Layout, specs: tuple[ReadingSpec, ...], rank: int) -> Plan:
        """The plan of a rank that reads `specs`."""
        places, source, minimum = [], [], []
        known: dict[ReadingSpec, int] = {}
        position, unknown = 0, False
        for spec in specs:
            start = layout.starts.get(spec)
            if start is None:
                unknown = True
            else:
                known[spec] = position
                start += rank if spec.combine in AVERAGES else 0
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
        return cls(
            specs,
            _joined(places),
            taken,
            _joined(minimum).astype(bool),
            unknown,
            whole,
            np.asarray([unknown], dtype=np.int32),
            Selection.of(sorted(known.items(), key=lambda one: (one[0].combine not in AVERAGES, one[0]))),
        )

    def on(self, device: torch.device, name: str) -> Tensor:
        """An attribute on the device; uploaded once."""
        tensor = self._device.get((device, name))
        if tensor is None:
            array = torch.from_numpy(getattr(self, name))
            tensor = self._device[device, name] = array.to(device, non_blocking=True)
        return tensor


def _largest_sum(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The largest sum over ranks of one group, (n,), of values and groups (n, ranks); values of ranks that
    have none are 0, and their groups NaN.
    """
    order = np.argsort(groups, axis=1, kind="stable")
    values, groups = (np.take_along_axis(of, order, axis=1) for of in (values, groups))
    starts = np.ones(groups.shape, dtype=bool)
    starts[:, 1:] = groups[:, 1:] != groups[:, :-1]  # NaN is by itself
    sums = np.add.reduceat(values.reshape(-1), np.flatnonzero(starts))
    rows = np.flatnonzero(starts) // values.shape[1]
    largest: np.ndarray = np.maximum.reduceat(sums, np.searchsorted(rows, np.arange(len(values))))
    return largest


def _numbers_first(spec: ReadingSpec) -> tuple[bool, ReadingSpec]:
    return spec.length > 1, spec


def _ranged(spec: ReadingSpec) -> bool:
    return spec.name == RANGED and spec.combine == "min"


def _joined(pieces: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.int64), *pieces])
