"""Training data: a dataset numbers its sequences, a batch plan says which rank sees which when."""

from __future__ import annotations

from nemo_fp8_recipes.training.data.batches import BatchPlan
from nemo_fp8_recipes.training.data.dataset import Dataset, Wanted
from nemo_fp8_recipes.training.data.megatron_indexed import MegatronIndexedDataset
from nemo_fp8_recipes.training.data.mock import MockDataset
from nemo_fp8_recipes.training.data.stdlib_text import StdlibTextDataset
from nemo_fp8_recipes.training.indexed_schema import MegatronIndexedConfig
from nemo_fp8_recipes.training.schema import DataConfig, MockConfig

__all__ = [
    "BatchPlan",
    "Dataset",
    "MegatronIndexedDataset",
    "MockDataset",
    "StdlibTextDataset",
    "Wanted",
    "build_dataset",
]


def build_dataset(config: DataConfig, *, seq_length: int, vocab_size: int, wanted: Wanted) -> Dataset:
    """The dataset `config` asks for; `prepare` it before the first sequence is taken.

    Raises:
        DataError: its data is missing or does not fit the model.
    """
    if isinstance(config, MockConfig):
        return MockDataset(config, seq_length=seq_length, vocab_size=vocab_size)
    if isinstance(config, MegatronIndexedConfig):
        return MegatronIndexedDataset(config, seq_length=seq_length, vocab_size=vocab_size, wanted=wanted)
    return StdlibTextDataset(config, seq_length=seq_length, vocab_size=vocab_size)
