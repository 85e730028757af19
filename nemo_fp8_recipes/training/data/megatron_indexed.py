"""Token files in Megatron's format, sampled by megatron.core.datasets: the sequences of a Megatron-LM job
with the same files, blend, split and seed, in the same order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_fp8_recipes.corpus.build import read_description
from nemo_fp8_recipes.corpus.index_file import IndexFile
from nemo_fp8_recipes.errors import DataError
from nemo_fp8_recipes.training.data import index_helpers
from nemo_fp8_recipes.training.data.dataset import Wanted
from nemo_fp8_recipes.training.distributed import agree, together
from nemo_fp8_recipes.training.indexed_schema import MegatronIndexedConfig, read_blend
from nemo_fp8_recipes.training.run_directory import DATA_INDEX

__all__ = ["MegatronIndexedDataset"]

_SPLITS = ("train", "valid", "test")


class _NoTokenizer:
    """Megatron asks for a tokenizer; the files hold tokens already, none of which is padding."""

    vocab_size = None
    pad = -1
    eod = -2
    unique_identifiers: dict[str, str] = {}  # noqa: RUF012  # Megatron reads it from an instance, as JSON


@dataclass(frozen=True)
class _Part:
    """What one split takes from one pair of files: sequences `first` to `end` of them."""

    index: IndexFile
    first: int
    end: int

    @property
    def tokens(self) -> int:
        return int(self.index.lengths[self.first : self.end].sum(dtype=np.int64))


class MegatronIndexedDataset:
    """Sequences of `seq_length` + 1 tokens, across the borders of documents, in Megatron's order.

    Args:
        wanted: Megatron draws a number of samples that is fixed beforehand, and their order depends on it.

    Raises:
        DataError: files are missing or broken, have tokens that the model lacks, or too little text.
    """

    name = "megatron_indexed"

    def __init__(
        self, config: MegatronIndexedConfig, *, seq_length: int, vocab_size: int, wanted: Wanted
    ) -> None:
        if config.samples is not None and config.samples < wanted.train:
            raise DataError(
                f"data.samples={config.samples} is less than the job takes: {wanted.train} "
                "(training.steps x training.global_batch_size).",
                key="data.samples",
                value=config.samples,
                allowed=[f">= {wanted.train}"],
            )
        self.seq_length = seq_length
        self._vocab_size = vocab_size
        self._config = config
        self._wanted = Wanted(config.samples or wanted.train, wanted.held_out)
        blends = (
            {"blend": config.blend}
            if config.blend
            else {"train_blend": config.train_blend, "valid_blend": config.valid_blend}
        )
        self._blends = {key: read_blend(f"data.{key}", words) for key, words in blends.items()}
        prefixes = [prefix for paths, _ in self._blends.values() for prefix in paths]
        self._files = {prefix: IndexFile.read(prefix) for prefix in prefixes}
        for prefix in self._files:
            self._check_vocabulary(prefix)
        self._check_size("train", self._wanted.train)
        self._check_size("valid", self._wanted.held_out)
        self.fingerprint = self._fingerprint()
        tokens = sum(index.tokens for index in self._files.values())
        documents = sum(len(index.lengths) for index in self._files.values())
        self.description = (
            f"{len(self._files)} file(s), {documents:,} documents, {tokens:,} tokens; "
            f"{self._wanted.train:,} sequences for training"
        )
        self._train: Any = None
        self._valid: Any = None

    # -- checks ------------------------------------------------------------------------------------------

    def _check_vocabulary(self, prefix: str) -> None:
        about = read_description(prefix)
        if about is not None and about["vocab_size"] > self._vocab_size:
            raise DataError(
                f"{prefix} holds tokens of a vocabulary of {about['vocab_size']}, the model has "
                f"{self._vocab_size}.",
                key="model.vocab_size",
                value=self._vocab_size,
                allowed=[f">= {about['vocab_size']}"],
            )

    def _parts(self, split: str) -> Iterator[_Part]:
        """What `split` takes from each pair of files; the borders are Megatron's own."""
        blend = self._blends.get("blend")
        if blend is None:
            for prefix in self._blends[f"{split}_blend"][0]:
                index = self._files[prefix]
                yield _Part(index, 0, len(index.lengths))
            return
        shares = self._config.split
        number = _SPLITS.index(split)
        first, end = (sum(shares[:count]) / sum(shares) for count in (number, number + 1))
        for prefix in blend[0]:
            index = self._files[prefix]
            sequences = float(len(index.lengths))
            yield _Part(index, round(first * sequences), round(end * sequences))

    def _check_size(self, split: str, wanted: int) -> None:
        """Megatron would search for ever for a sample in nothing."""
        if not wanted:
            return
        parts = list(self._parts(split))
        short = next((part for part in parts if part.tokens <= self.seq_length), None)
        purpose = "training" if split == "train" else "the held-out loss"
        if not parts:
            raise DataError(
                f"There are no files for {purpose}: data.{split}_blend is empty.",
                key=f"data.{split}_blend",
                hint="Name some, or set training.eval_batches=0.",
            )
        if short is not None:
            raise DataError(
                f"{short.index.prefix} gives {short.end - short.first} documents with {short.tokens} tokens "
                f"to {purpose}, less than one sequence of {self.seq_length + 1}.",
                key="data.split" if self._config.blend else f"data.{split}_blend",
                value=short.index.prefix,
                hint="Give it a larger share in data.split, or more text."
                if split == "train"
                else "Give it a larger share in data.split, or set training.eval_batches=0.",
            )

    def _fingerprint(self) -> str:
        config = self._config
        words: list[object] = [self.seq_length, config.seed, self._wanted.train]
        words += [config.split] if config.blend else []
        for key, (prefixes, weights) in self._blends.items():
            words += [key, weights, [self._files[prefix].digest() for prefix in prefixes]]
        return hashlib.sha256(repr(words).encode()).hexdigest()

    # -- indices -----------------------------------------------------------------------------------------

    def prepare(self, run_dir: Path) -> None:
        """Build the indices on rank 0, or find them built, and map them on every rank. Collective.

        Raises:
            DataError: they cannot be written or read, or the files hold too few sequences.
        """
        parent = Path(self._config.cache) if self._config.cache is not None else run_dir / DATA_INDEX
        # Megatron names an index by the path of its files, not by what is in them.
        cache = parent / self.fingerprint[:32]

        def make() -> None:
            try:
                cache.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise _unwritable(cache, error) from error

        agree(make)
        if index_helpers.provide():
            self.description += "; indices built by numpy, since Megatron's helpers are not compiled here"
        self._train, self._valid = self._build(cache)
        together(self._check_built)

    def _build(self, cache: Path) -> tuple[Any, Any]:
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

        blend: dict[str, Any]
        if "blend" in self._blends:
            split = ",".join(f"{share:g}" for share in self._config.split)
            blend = {"blend": self._blends["blend"], "split": split}
        else:
            held_out = self._blends["valid_blend"] if self._wanted.held_out else None
            blend = {"blend_per_split": [self._blends["train_blend"], held_out, None]}
        config = GPTDatasetConfig(
            random_seed=self._config.seed,
            sequence_length=self.seq_length,
            path_to_cache=str(cache),
            mmap_bin_files=self._config.mmap,
            tokenizer=_NoTokenizer(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            **blend,
        )
        if config.split_matrix is not None:
            # What is not needed is not built: in a split without documents Megatron looks for one for ever.
            config.split_matrix[2] = None
            if not self._wanted.held_out:
                config.split_matrix[1] = None
        sizes = [self._wanted.train, self._wanted.held_out, 0]
        builder = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config)
        try:
            train, valid, _ = builder.build()
        except OSError as error:
            raise _unwritable(cache, error) from error
        except Exception as error:
            if isinstance(error.__cause__, OSError):  # Megatron wraps it
                raise _unwritable(cache, error.__cause__) from error
            raise
        return train, valid

    def _check_built(self) -> None:
        for dataset, wanted, key in (
            (self._train, self._wanted.train, "train"),
            (self._valid, self._wanted.held_out, "valid"),
        ):
            if wanted and len(dataset) < wanted:
                raise DataError(
                    f"The blend without weights gives its files once: {len(dataset)} sequences, and the job "
                    f"takes {wanted}.",
                    key="data.blend" if self._config.blend else f"data.{key}_blend",
                    hint="Give weights, such as [0.3, a, 0.7, b]: then files are repeated as needed.",
                )

    # -- sequences ---------------------------------------------------------------------------------------

    def train(self, number: int) -> torch.Tensor:
        return self._sequence(self._train, number)

    def held_out(self, number: int) -> torch.Tensor:
        return self._sequence(self._valid, number)

    def _sequence(self, dataset: Any, number: int) -> torch.Tensor:
        sample = dataset[number]
        sequence = torch.cat([sample["tokens"], sample["labels"][-1:]])
        highest = int(sequence.max())
        if highest >= self._vocab_size or int(sequence.min()) < 0:
            raise DataError(
                f"Sequence {number} holds token {highest}, and the model has {self._vocab_size}.",
                key="model.vocab_size",
                value=self._vocab_size,
                allowed=["the vocabulary that the files were made with"],
            )
        return sequence


def _unwritable(cache: Path, error: OSError) -> DataError:
    return DataError(
        f"Cannot keep the indices in {cache}: {error.strerror or error}.",
        key="data.cache",
        value=str(cache),
        hint="Name a directory that all nodes share and may write to: data.cache=PATH.",
    )
