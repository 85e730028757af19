"""What all ranks read in a step, on the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from nemo_fp8_recipes.telemetry.probes.base import ReadingSpec

__all__ = ["Found"]


class Found(Mapping[ReadingSpec, np.ndarray]):
    """fp32 (length,) for each reading. Most are one number; these lie in one array.

    Attributes:
        specs: the readings of one number; steps that read the same have the same tuple.
        numbers: fp32 (len(specs),).
        windows: the longer readings; mostly `Rows`.
    """

    def __init__(
        self,
        specs: tuple[ReadingSpec, ...],
        numbers: np.ndarray,
        windows: Mapping[ReadingSpec, np.ndarray],
    ) -> None:
        self.specs = specs
        self.numbers = numbers
        self.windows = windows

    @classmethod
    def nothing(cls) -> Found:
        return cls((), np.zeros(0, dtype=np.float32), {})

    def __getitem__(self, spec: ReadingSpec) -> np.ndarray:
        if spec in self.windows:
            return self.windows[spec]
        try:
            index = self.specs.index(spec)
        except ValueError:
            raise KeyError(spec) from None
        return self.numbers[index : index + 1]

    def __iter__(self) -> Iterator[ReadingSpec]:
        yield from self.specs
        yield from self.windows

    def __len__(self) -> int:
        return len(self.specs) + len(self.windows)
