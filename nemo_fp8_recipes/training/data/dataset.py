"""What the training job needs of a dataset."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

__all__ = ["Dataset", "InMemory", "Wanted"]


@dataclass(frozen=True)
class Wanted:
    """How many sequences the job takes from its first step to its last."""

    train: int
    held_out: int


class Dataset(Protocol):
    """Numbered sequences of `seq_length` + 1 tokens: the inputs and, shifted by one, the labels.

    A sequence depends on its number and the configuration alone. So the position in the data is one number,
    every rank can fetch any sequence, and a resumed run sees what an uninterrupted one would have seen.
    """

    name: str
    fingerprint: str
    """Changes when the content or the order of the sequences does; kept with checkpoints."""
    description: str
    """One line for the banner."""

    def prepare(self, run_dir: Path) -> None:
        """Make what is kept on disk, in the run directory unless the configuration says elsewhere.
        Collective; before the first sequence is taken."""
        ...

    def train(self, number: int) -> torch.Tensor:
        """Training sequence `number` (0, 1, 2, … up to what is wanted): int64 [seq_length + 1]."""
        ...

    def held_out(self, number: int) -> torch.Tensor:
        """Sequence `number` of those never trained on: int64 [seq_length + 1]."""
        ...


class InMemory:
    """A dataset that keeps nothing on disk."""

    def prepare(self, run_dir: Path) -> None:
        del run_dir
