"""Curves in a terminal."""

from __future__ import annotations

import math

import pytest

from nemo_fp8_recipes.report.curve import plot, trend


def ink(lines: list[str]) -> list[list[int]]:
    """Columns of the plot area that hold a mark, for each line."""
    area = [line.split("|", 1)[1] for line in lines if "|" in line]
    return [[column for column, mark in enumerate(line) if mark == "*"] for line in area]


def test_a_falling_curve_starts_high_and_ends_low() -> None:
    lines = plot([(1, 10.0), (50, 5.0), (100, 0.0)], width=40, height=5, unicode=False)
    marks = ink(lines)
    assert 0 in marks[0]
    assert 39 in marks[-1]
    assert 39 not in marks[0]
    assert lines[0].startswith("10 |")
    assert lines[4].strip().startswith("0 |")
    assert lines[-1].split() == ["1", "100"]


@pytest.mark.parametrize("points", [2, 3, 12, 500])
def test_every_column_is_drawn_however_few_the_points(points: int) -> None:
    lines = plot([(x, math.sin(x)) for x in range(points)], width=30, height=6, unicode=False)
    assert {column for line in ink(lines) for column in line} == set(range(30))


def test_braille_draws_the_same_range() -> None:
    lines = plot([(1, 3.0), (2, 1.0)], width=10, height=4)
    assert lines[0].startswith("3 ┤")
    assert lines[3].startswith("1 ┤")
    assert all(len(line) <= 3 + 10 for line in lines)


def test_a_flat_curve_and_a_single_point_are_drawn() -> None:
    assert sum(map(len, ink(plot([(1, 2.0), (2, 2.0)], width=10, height=3, unicode=False)))) == 10
    assert plot([(1, 2.0)], width=10, height=3) != []
    assert plot([]) == []


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([1.0, 2.0, 4.0, 8.0], "▁▃▆█"),
        ([8.0, 1.0], "█▁"),
        ([1.0, 1.1, 1.0], "▅▅▅"),
        ([0.0, math.nan, math.inf], ""),
        ([], ""),
    ],
)
def test_trends(values: list[float], shown: str) -> None:
    assert trend(values) == shown


def test_a_long_trend_is_cut_to_its_width() -> None:
    assert trend([2.0**i for i in range(100)], width=8) == "▁▂▃▄▅▆▇█"
