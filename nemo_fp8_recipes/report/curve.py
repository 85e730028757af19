"""Curves in a terminal: a plot with axes, and a one-line trend."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["plot", "trend"]

_BARS = "▁▂▃▄▅▆▇█"
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of a braille cell, by row and column of its dots."""


def plot(
    points: Sequence[tuple[float, float]], *, width: int = 60, height: int = 8, unicode: bool = True
) -> list[str]:
    """Lines of text that show y over x, with the y axis at the left and the range of x below.

    Args:
        points: (x, y), x ascending, y finite. Several points that fall into one column show as their mean.
        width, height: of the plot area in characters.
        unicode: draw with braille dots, eight a character; otherwise with asterisks.
    """
    if not points:
        return []
    columns, rows = (2 * width, 4 * height) if unicode else (width, height)
    heights = _joined(_column_means(points, columns))
    low, high = min(heights), max(heights)
    span = high - low or 1.0
    on: set[tuple[int, int]] = set()
    previous: int | None = None
    for column, y in enumerate(heights):
        row = round((high - y) / span * (rows - 1)) if high > low else rows // 2
        # A vertical stroke joins neighbouring columns, so that a steep curve stays one curve.
        before = row if previous is None else previous
        on.update((filled, column) for filled in range(min(row, before), max(row, before) + 1))
        previous = row
    labels = [f"{high:.4g}", *[""] * (height - 2), f"{low:.4g}"]
    margin = max(map(len, labels))
    body = [
        f"{label:>{margin}} {'┤' if unicode else '|'}{_line(on, row, width, unicode=unicode)}".rstrip()
        for row, label in enumerate(labels)
    ]
    first, last = f"{points[0][0]:g}", f"{points[-1][0]:g}"
    gap = " " * max(1, width - len(first) - len(last))
    return [*body, f"{'':{margin}}  {first}{gap}{last}"]


def trend(values: Sequence[float], *, width: int = 8, unicode: bool = True) -> str:
    """One line of at most `width` characters that shows how positive values moved, on a logarithmic scale.

    Values that are zero or not finite are left out; a series of equal values is flat in the middle.
    """
    logs = [math.log2(value) for value in values if value > 0 and math.isfinite(value)]
    if not logs:
        return ""
    means = [y for y in _column_means(list(enumerate(logs)), min(width, len(logs))) if y is not None]
    low, span = min(means), max(means) - min(means)
    bars = _BARS if unicode else ".-=#"
    # Less than half a binade is no movement worth drawing.
    if span < 0.5:
        return bars[len(bars) // 2] * len(means)
    return "".join(bars[round((y - low) / span * (len(bars) - 1))] for y in means)


def _column_means(points: Sequence[tuple[float, float]], columns: int) -> list[float | None]:
    """Mean y of the points in each of `columns` equal intervals of x; None where there is none."""
    first, last = points[0][0], points[-1][0]
    found: list[list[float]] = [[] for _ in range(columns)]
    for x, y in points:
        position = (x - first) / (last - first) if last > first else 0.0
        found[min(columns - 1, int(position * columns))].append(y)
    return [sum(ys) / len(ys) if ys else None for ys in found]


def _joined(heights: Sequence[float | None]) -> list[float]:
    """The columns between two points on the straight line through them; before the first and after the last
    point their own height. At least one column has a point.
    """
    known = [(column, y) for column, y in enumerate(heights) if y is not None]
    joined = [known[0][1]] * len(heights)
    for (left, low), (right, high) in zip(known, [*known[1:], (len(heights), known[-1][1])], strict=True):
        for column in range(left, right):
            joined[column] = low + (high - low) * (column - left) / (right - left)
    return joined


def _line(on: set[tuple[int, int]], row: int, width: int, *, unicode: bool) -> str:
    if not unicode:
        return "".join("*" if (row, column) in on else " " for column in range(width))
    cells = []
    for column in range(width):
        bits = 0
        for dot_row, pair in enumerate(_DOTS):
            for dot_column, bit in enumerate(pair):
                if (4 * row + dot_row, 2 * column + dot_column) in on:
                    bits |= bit
        cells.append(chr(0x2800 + bits) if bits else " ")
    return "".join(cells)
