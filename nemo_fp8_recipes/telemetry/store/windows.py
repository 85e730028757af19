"""Windows in the store: what is new since the series' previous row, and the whole ones made of that again.

A history window moves by an entry an update, so almost all of it is in the row before it. A row therefore
holds the `newest` entries alone, with the step of the row it continues, `since`:

    window = (window of `since`)[len(newest):] followed by newest        as long as that of `since`
    window = newest                                                       where `since` is null

`since` is the row of the same series right before it in the same file. It is given only where the two windows
were compared and overlap bit for bit; whatever else happened to a window, its row is whole. The entries of a
series lie one after the other in the file, so every window is one piece of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from nemo_fp8_recipes.telemetry.rows import Rows
from nemo_fp8_recipes.telemetry.series import Series

__all__ = [
    "TYPE",
    "DamagedWindows",
    "Entries",
    "Pieces",
    "continued",
    "continued_by_series",
    "moved",
    "pieces",
    "rejoined",
    "whole",
]

TYPE = pa.list_(pa.field("element", pa.float32(), nullable=False))
"""Of a column of windows."""

_BYTES = 4
"""Of an fp32 entry."""

_TRIED = 64
"""Places at which a window is laid over the one before it. Beside each other they differ by one entry an
update, and a window whose place is not found is stored whole.
"""


class DamagedWindows(ValueError):
    """A row continues one that is not there."""


def moved(old: bytes, new: bytes, guess: int = 1) -> int | None:
    """How many entries `new` has behind the ones it shares with `old`: the fewest, or `guess`.

    Args:
        old, new: windows, bytes of fp32 entries.
        guess: tried first.

    Returns:
        k with new[:-k] == old[k:] in bits, 0 where they are the same; None where they are not of the same
        length, share nothing, or are alike in too many places to tell.
    """
    if len(old) != len(new) or not new:
        return None
    if len(new) > guess * _BYTES and new.startswith(old[guess * _BYTES :]):
        return guess
    last, end = old[-_BYTES:], len(new)
    for _ in range(_TRIED):
        end = new.rfind(last, 0, end)
        if end < 0:
            return None
        inside = end % _BYTES  # of an entry: the bytes of two of them look like this one
        behind = len(new) - end - _BYTES
        if not inside and new.startswith(old[behind:]):
            return behind // _BYTES
        end += _BYTES - inside if inside else 0
    return None


class Entries(NamedTuple):
    """What rows hold of their windows.

    Attributes:
        flat: fp32, of all rows, one after the other.
        lengths: int64 (rows,).
        since: int64 (rows,), step of the row that is continued; -1 where the window is whole.
    """

    flat: np.ndarray
    lengths: np.ndarray
    since: np.ndarray

    def at(self, rows: np.ndarray) -> Entries:
        """Those of some rows, int64, in their order."""
        lengths = self.lengths[rows]
        starts = (np.cumsum(self.lengths) - self.lengths)[rows]
        moves = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
        return Entries(self.flat[moves + np.arange(len(moves))], lengths, self.since[rows])


def continued(
    series: Sequence[np.ndarray], steps: Sequence[int], windows: Sequence[Mapping[Series, np.ndarray]]
) -> Entries:
    """Windows as they are stored: the first of every series whole.

    Args:
        series: of each step, a number for each of its series; the same array where they are the same.
        steps: ascending.
        windows: of each step, fp32.

    Returns:
        The rows of the first step, then those of the second, ...
    """
    parts = _by_step(series, steps, windows)
    return Entries(
        np.concatenate([np.zeros(0, dtype=np.float32), *(part.ends.reshape(-1) for part in parts)]),
        np.concatenate([np.zeros(0, dtype=np.int64), *(part.lengths for part in parts)]),
        np.concatenate([np.zeros(0, dtype=np.int64), *(part.since for part in parts)]),
    )


def continued_by_series(
    series: np.ndarray,
    steps: Sequence[int],
    windows: Sequence[Mapping[Series, np.ndarray]],
    order: np.ndarray,
) -> Entries:
    """As `continued`, of steps that all hold the same series.

    Args:
        series: a number for each.
        order: int64 (series,), their places in the order that is wanted.

    Returns:
        The rows of the first series in `order`, step after step, then those of the second, ...
    """
    parts = _by_step([series] * len(steps), steps, windows)
    count = np.stack([part.lengths for part in parts])[:, order].T
    since = np.stack([part.since for part in parts])[:, order].T
    if all(part.ends.ndim == 2 for part in parts):
        flat = np.concatenate([part.ends[order] for part in parts], axis=1).reshape(-1)
        return Entries(flat, count.reshape(-1), since.reshape(-1))
    rows = order[:, None] + len(order) * np.arange(len(parts))
    ends = np.concatenate([np.zeros(0, dtype=np.float32), *(part.ends.reshape(-1) for part in parts)])
    everything = (
        np.concatenate([part.lengths for part in parts]),
        np.concatenate([part.since for part in parts]),
    )
    return Entries(ends, *everything).at(rows.reshape(-1))


class _Part(NamedTuple):
    """What the rows of one step hold of their windows.

    Attributes:
        ends: fp32, of one row after the other: (rows, entries) where each holds as many, else flat.
        lengths: int64 (rows,), entries of each.
        since: int64 (rows,), as in `Entries`.
    """

    ends: np.ndarray
    lengths: np.ndarray
    since: np.ndarray


def _by_step(
    series: Sequence[np.ndarray], steps: Sequence[int], windows: Sequence[Mapping[Series, np.ndarray]]
) -> list[_Part]:
    """The rows of each step; arguments as of `continued`."""
    parts = []
    shifts = np.zeros(0, dtype=np.int64)
    for place, found in enumerate(windows):
        follows = place > 0 and series[place - 1] is series[place]
        if not follows:
            shifts = np.ones(len(found), dtype=np.int64)
        if follows and _moved_alike(windows[place - 1], found, shifts):
            count, before = shifts.copy(), np.full(len(found), steps[place - 1])
        elif place == 0 and isinstance(found, Rows):
            count = np.full(len(found), found.matrix.shape[1], dtype=np.int64)
            before = np.full(len(found), -1, dtype=np.int64)
        else:
            count, before = _one_by_one(series, steps, windows, place, shifts)
        parts.append(_Part(_ends(found, count), count, before))
    return parts


def _moved_alike(
    old: Mapping[Series, np.ndarray], new: Mapping[Series, np.ndarray], shifts: np.ndarray
) -> bool:
    """Whether one look at all windows tells that they moved by `shifts`, or all as the first one of them did,
    which is then written to `shifts`.
    """
    alike = _alike(old, new, shifts)
    if alike is not None and not alike.all() and (shifts == shifts[0]).all():
        first = moved(_bytes(_row(old, 0)), _bytes(_row(new, 0)), int(shifts[0]))
        if first is not None and first != shifts[0]:
            guess = np.full_like(shifts, first)
            alike = _alike(old, new, guess)
            if alike is not None and alike.all():
                shifts[:] = guess
    return alike is not None and bool(alike.all())


def _alike(
    old: Mapping[Series, np.ndarray], new: Mapping[Series, np.ndarray], shifts: np.ndarray
) -> np.ndarray | None:
    """bool (rows,): whether windows of the same series moved by `shifts`; None where one look at all of them
    does not tell.
    """
    if not (isinstance(old, Rows) and isinstance(new, Rows) and old.matrix.shape == new.matrix.shape):
        return None
    ahead, behind = (rows.matrix.astype(np.float32, copy=False).view(np.uint32) for rows in (new, old))
    length = ahead.shape[1]
    found = np.zeros(len(ahead), dtype=bool)
    different = np.unique(shifts).tolist()
    for shift in different:
        if shift >= length:
            continue
        if len(different) == 1:
            same = ahead[:, : length - shift] == behind[:, shift:]
            return same.all(axis=1) if not same.all() else np.ones(len(ahead), dtype=bool)
        rows = shifts == shift
        found[rows] = (ahead[rows, : length - shift] == behind[rows, shift:]).all(axis=1)
    return found


def _one_by_one(
    series: Sequence[np.ndarray],
    steps: Sequence[int],
    windows: Sequence[Mapping[Series, np.ndarray]],
    place: int,
    shifts: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of what to store of each window of a step, and the steps of the rows that are continued. Writes
    to `shifts` by how many entries they moved.
    """
    count = np.asarray([len(window) for window in windows[place].values()], dtype=np.int64)
    before = np.full(len(count), -1, dtype=np.int64)
    for row, (number, window) in enumerate(zip(series[place].tolist(), windows[place].values(), strict=True)):
        for earlier in range(place - 1, -1, -1):
            where = np.flatnonzero(series[earlier] == number)
            if not len(where):
                continue
            old = _row(windows[earlier], int(where[0]))
            behind = moved(_bytes(old), _bytes(window), int(shifts[row]))
            if behind is not None:
                shifts[row] = count[row] = behind
                before[row] = steps[earlier]
            break
    return count, before


def _row(windows: Mapping[Series, np.ndarray], row: int) -> np.ndarray:
    found: np.ndarray = windows.matrix[row] if isinstance(windows, Rows) else [*windows.values()][row]
    return found


def _ends(windows: Mapping[Series, np.ndarray], count: np.ndarray) -> np.ndarray:
    """The last entries of each window, one after the other: (rows, entries) where that is one matrix."""
    if not isinstance(windows, Rows):
        ends = [window[len(window) - last :] for window, last in zip(windows.values(), count, strict=True)]
        return np.concatenate([np.zeros(0, dtype=np.float32), *ends], dtype=np.float32)
    matrix = windows.matrix
    length, last = matrix.shape[1], int(count[0])
    if (count == last).all():
        return matrix[:, length - last :].astype(np.float32, copy=False)
    found: np.ndarray = matrix[np.arange(length) >= length - count[:, None]].astype(np.float32, copy=False)
    return found


def _bytes(window: np.ndarray) -> bytes:
    return window.astype(np.float32, copy=False).tobytes()


class Pieces(NamedTuple):
    """Where the windows of rows are among the entries of all of them.

    Attributes:
        entries: fp32, of all rows, one after the other.
        counts: int64 (rows,), entries that each row has itself.
        starts, ends: int64 (rows,), of the whole windows.
    """

    entries: np.ndarray
    counts: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def window(self, row: int) -> np.ndarray:
        """fp32 (length,), a view."""
        return self.entries[self.starts[row] : self.ends[row]]


def pieces(newest: pa.ListArray, since: pa.Int64Array, step: np.ndarray, same: np.ndarray) -> Pieces:
    """Find the windows of consecutive rows.

    Args:
        newest, since: of each row, as they are stored; null where the row is a number.
        step: int64 (rows,).
        same: bool (rows,), whether the row is of the same series as the one before it.

    Raises:
        DamagedWindows: a row continues another than the one before it, or one that is shorter than what is
            new.
    """
    offsets = newest.offsets.to_numpy().astype(np.int64)
    counts, ends = np.diff(offsets), offsets[1:]
    before = since.fill_null(-1).to_numpy()
    continues = before >= 0
    astray = continues & ~(same & (before == np.concatenate([[-1], step[:-1]])))
    if astray.any():
        row = int(np.flatnonzero(astray)[0])
        raise DamagedWindows(
            f"the window of step {step[row]} continues that of step {before[row]}, which is not before it"
        )
    # The rows of a chain have the length of the one that it begins with.
    first = np.maximum.accumulate(np.where(continues, 0, np.arange(len(counts))))
    lengths = counts[first]
    if (counts > lengths).any():
        raise DamagedWindows("a window continues one that is shorter than what is new in it")
    return Pieces(newest.values.to_numpy(), counts, ends - lengths, ends)


def whole(
    found: Pieces, rows: np.ndarray, numbers: np.ndarray, *, most: int = 1 << 28
) -> Iterator[tuple[np.ndarray, pa.ListArray]]:
    """The windows of some rows, whole, a few rows at a time.

    Args:
        rows: positions.
        numbers: bool, of all rows: this one has no window, and gets null.
        most: entries at a time, about: an Arrow list has less than 2^31.

    Yields:
        Some of `rows`, and their windows.
    """
    lengths = (found.ends - found.starts)[rows]
    begin = 0
    while begin < len(rows):
        total = np.cumsum(lengths[begin:])
        end = begin + max(1, int(np.searchsorted(total, most, side="right")))
        chosen = rows[begin:end]
        offsets = np.concatenate([[0], total[: end - begin]]).astype(np.int32)
        windows = [found.window(row) for row in chosen[lengths[begin:end] > 0].tolist()]
        flat = np.concatenate([np.zeros(0, dtype=np.float32), *windows])
        mask = pa.array(numbers[chosen])
        yield chosen, pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat), type=TYPE, mask=mask)
        begin = end


def rejoined(
    newest: pa.ListArray, since: pa.Int64Array, step: np.ndarray, same: np.ndarray
) -> tuple[pa.ListArray, pa.Int64Array]:
    """Both columns, with what can be left out of whole windows now that rows come after others.

    Args and errors: as of `pieces`.
    """
    found = pieces(newest, since, step, same)
    there = newest.is_valid().to_numpy(zero_copy_only=False)
    candidates = there & same & ~since.is_valid().to_numpy(zero_copy_only=False)
    candidates[1:] &= there[:-1]
    keep = np.ones(len(found.entries), dtype=bool)
    counts, before = found.counts.copy(), since.fill_null(-1).to_numpy().copy()
    shift = 1
    for row in np.flatnonzero(candidates).tolist():
        behind = moved(_bytes(found.window(row - 1)), _bytes(found.window(row)), shift)
        if behind is None:
            continue
        shift = behind
        end = int(found.ends[row])
        keep[end - int(counts[row]) : end - behind] = False
        counts[row], before[row] = behind, step[row - 1]
    first = int(found.ends[0] - found.counts[0]) if len(counts) else 0
    last = int(found.ends[-1]) if len(counts) else 0
    flat = found.entries[first:last][keep[first:last]]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    lists = pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(flat), type=newest.type, mask=pa.array(~there)
    )
    return lists, pa.array(before, mask=before < 0)
