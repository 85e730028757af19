"""The typed shape of `data=megatron_indexed`: which token files, how they are mixed and split. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from nemo_fp8_recipes.errors import ConfigError

__all__ = ["MegatronIndexedConfig", "read_blend"]


@dataclass
class MegatronIndexedConfig:
    """Token files in Megatron's format, and how they are mixed and split."""

    name: str = "megatron_indexed"
    blend: list[str | float] = field(default_factory=list)
    split: list[float] = field(default_factory=lambda: [969.0, 30.0, 1.0])
    train_blend: list[str | float] = field(default_factory=list)
    valid_blend: list[str | float] = field(default_factory=list)
    samples: int | None = None
    seed: int = 1234
    cache: str | None = None
    mmap: bool = True

    def __post_init__(self) -> None:
        for key in ("blend", "train_blend", "valid_blend"):
            read_blend(f"data.{key}", getattr(self, key))
        if self.blend and (self.train_blend or self.valid_blend):
            raise ConfigError(
                "data.blend is split into training and held-out documents; data.train_blend and "
                "data.valid_blend say themselves what is what: give one or the other.",
                key="data.blend",
            )
        if len(self.split) != 3 or min(self.split) < 0 or not self.split[0]:
            raise ConfigError(
                f"data.split={self.split} is not possible.",
                key="data.split",
                value=self.split,
                allowed=["three shares, such as [969, 30, 1], the first above 0"],
            )
        for key, value, least in (("samples", self.samples, 1), ("seed", self.seed, 0)):
            if value is not None and value < least:
                raise ConfigError(
                    f"data.{key}={value} is out of range.",
                    key=f"data.{key}",
                    value=value,
                    allowed=[f">= {least}"],
                )

    def require_files(self) -> None:
        """Raise `ConfigError` when no files are named: the group has no default for them."""
        if not self.blend and not self.train_blend:
            raise ConfigError(
                "data.blend needs a value: the files to train on.",
                key="data.blend",
                allowed=["paths without .bin: [a, b], or a weight before each: [0.3, a, 0.7, b]"],
                hint="nemo-fp8 data makes them from text.",
            )


def read_blend(key: str, words: Sequence[str | float]) -> tuple[list[str], list[float] | None]:
    """Paths and weights of a blend, written as Megatron's --data-path; weights are None when none are given.

    Raises:
        ConfigError: naming `key`, for weights without paths and the other way round.
    """
    weights = [_weight(word) for word in words]
    if all(weight is None for weight in weights):
        return [str(word) for word in words], None
    paths, given = words[1::2], weights[0::2]
    if len(words) % 2 or None in given or any(isinstance(path, int | float) for path in paths):
        raise ConfigError(
            f"{key}={list(words)} is no blend.",
            key=key,
            value=list(words),
            allowed=["[a, b]", "[0.3, a, 0.7, b]: a weight before every path"],
        )
    numbers = [weight for weight in given if weight is not None]
    if not all(math.isfinite(weight) and weight > 0 for weight in numbers):
        raise ConfigError(f"{key}: a weight is not above 0.", key=key, value=list(words), allowed=["> 0"])
    return [str(path) for path in paths], numbers


def _weight(word: str | float) -> float | None:
    """A word as a number; None for a path."""
    try:
        return float(word)
    except ValueError:
        return None
