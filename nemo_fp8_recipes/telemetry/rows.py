"""Arrays of one length by their names, in one matrix."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import TypeVar

import numpy as np

__all__ = ["Rows"]

K = TypeVar("K")


class Rows(Mapping[K, np.ndarray]):
    """The rows of a matrix as a mapping. What looks at all of them has them in `matrix`.

    Attributes:
        names: of the rows, each once; steps that hold the same have the same tuple.
        matrix: (len(names), length).
    """

    def __init__(self, names: tuple[K, ...], matrix: np.ndarray) -> None:
        self.names = names
        self.matrix = matrix

    @functools.cached_property
    def _places(self) -> dict[K, int]:
        return {name: place for place, name in enumerate(self.names)}

    def __getitem__(self, name: K) -> np.ndarray:
        row: np.ndarray = self.matrix[self._places[name]]
        return row

    def __iter__(self) -> Iterator[K]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
