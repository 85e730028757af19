"""Synthetic sequences with a rule to learn and noise that cannot be learned."""

from __future__ import annotations

import hashlib

import torch

from nemo_fp8_recipes.errors import DataError
from nemo_fp8_recipes.training.data.dataset import InMemory
from nemo_fp8_recipes.training.schema import MockConfig

__all__ = ["MockDataset"]


class MockDataset(InMemory):
    """Each token determines the next one by a fixed random permutation; a share `noise` is random instead.

    A model that has learned the permutation reaches the entropy of the noise,
    -(1-p) ln(1-p+p/A) - p ln(p/A) roughly, for noise p and alphabet A.
    """

    name = "mock"

    def __init__(self, config: MockConfig, *, seq_length: int, vocab_size: int) -> None:
        if config.alphabet > vocab_size:
            raise DataError(
                f"data.alphabet={config.alphabet} is larger than the model's vocabulary of {vocab_size}.",
                key="data.alphabet",
                value=config.alphabet,
                allowed=[f"<= {vocab_size}"],
            )
        self.seq_length = seq_length
        self._config = config
        rule = torch.Generator().manual_seed(config.seed)
        self._successor = torch.randperm(config.alphabet, generator=rule).tolist()
        settings = f"{config.alphabet}|{config.noise!r}|{config.seed}|{seq_length}"
        self.fingerprint = hashlib.sha256(settings.encode()).hexdigest()
        self.description = f"synthetic, {config.alphabet} tokens, {config.noise:.0%} noise"

    def train(self, number: int) -> torch.Tensor:
        return self._sequence("train", number)

    def held_out(self, number: int) -> torch.Tensor:
        return self._sequence("held_out", number)

    def _sequence(self, split: str, number: int) -> torch.Tensor:
        digest = hashlib.sha256(f"{self._config.seed}|{split}|{number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        length = self.seq_length + 1
        random = torch.randint(self._config.alphabet, (length,), generator=generator).tolist()
        noisy = (torch.rand(length, generator=generator) < self._config.noise).tolist()
        tokens = [random[0]]
        for position in range(1, length):
            tokens.append(random[position] if noisy[position] else self._successor[tokens[-1]])
        return torch.tensor(tokens, dtype=torch.int64)
