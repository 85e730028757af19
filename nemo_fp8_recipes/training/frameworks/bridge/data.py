"""The job's sequences as the datasets that Bridge's data loader wants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset as TorchDataset

from nemo_fp8_recipes import typed
from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.training.data import Wanted, build_dataset
from nemo_fp8_recipes.training.schema import GROUPS

try:
    from megatron.bridge.data.base import DatasetProvider
except ImportError:  # Bridge 0.3
    from megatron.bridge.training.config import DatasetProvider

__all__ = ["RunData", "Sequences"]


class Sequences(TorchDataset[dict[str, torch.Tensor]]):
    """Sequences 0 to `count` - 1 of a dataset; Bridge's sampler deals them out as `BatchPlan` does."""

    def __init__(self, sequence: Callable[[int], torch.Tensor], count: int) -> None:
        self._sequence = sequence
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        """int64 `tokens`, `labels` and `position_ids`, fp32 `loss_mask`, each [seq]: every token counts."""
        row = self._sequence(int(number))
        tokens = row[:-1]
        return {
            "tokens": tokens,
            "labels": row[1:],
            "loss_mask": torch.ones(tokens.numel(), dtype=torch.float32),
            "position_ids": torch.arange(tokens.numel()),
        }


@dataclass
class RunData(DatasetProvider):
    """The `data` group of the configuration. Plain fields, because Bridge saves its config with checkpoints.

    Attributes:
        data: the group as a mapping.
        run_dir: where a dataset keeps what it makes on disk.
        seq_length: tokens in a sequence.
        vocab_size: tokens of the model.
    """

    data: dict[str, Any] = field(default_factory=dict)
    run_dir: str = "."
    seq_length: int = 0
    vocab_size: int = 0
    skip_getting_attention_mask_from_dataset: bool = True

    def build_datasets(self, context: Any) -> tuple[Sequences, Sequences | None, None]:
        """Training and held-out sequences, as many as Bridge asks for."""
        schemas: Any = GROUPS["data"]
        config = typed.read(schemas[self.data["name"]], self.data, key="data", error=ConfigError)
        dataset = build_dataset(
            config,
            seq_length=self.seq_length,
            vocab_size=self.vocab_size,
            wanted=Wanted(train=context.train_samples, held_out=context.valid_samples),
        )
        dataset.prepare(Path(self.run_dir))
        held_out = Sequences(dataset.held_out, context.valid_samples) if context.valid_samples else None
        return Sequences(dataset.train, context.train_samples), held_out, None
