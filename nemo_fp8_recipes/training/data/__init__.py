"""Training data: a dataset numbers its sequences, a batch plan says which rank sees which when."""

from __future__ import annotations

from nemo_fp8_recipes.training.data.batches import BatchPlan
from nemo_fp8_recipes.training.data.dataset import Dataset
from nemo_fp8_recipes.training.data.mock import MockDataset
from nemo_fp8_recipes.training.data.stdlib_text import StdlibTextDataset
from nemo_fp8_recipes.training.schema import MockConfig, StdlibTextConfig

__all__ = ["BatchPlan", "Dataset", "MockDataset", "StdlibTextDataset", "build_dataset"]


def build_dataset(config: StdlibTextConfig | MockConfig, *, seq_length: int, vocab_size: int) -> Dataset:
    """The dataset `config` asks for. Raises `DataError` when its data is missing or does not fit the
    model."""
    if isinstance(config, MockConfig):
        return MockDataset(config, seq_length=seq_length, vocab_size=vocab_size)
    return StdlibTextDataset(config, seq_length=seq_length, vocab_size=vocab_size)
