"""Byte-level text of the running Python's own standard library."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch

from nemo_fp8_recipes.errors import DataError
from nemo_fp8_recipes.training.data.dataset import InMemory
from nemo_fp8_recipes.training.schema import StdlibTextConfig

__all__ = ["StdlibTextDataset"]

BYTES = 256
# Installed packages and test suites: not the library's own text, and not the same on every machine.
SKIPPED_DIRECTORIES = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib-dynload"}
)


class StdlibTextDataset(InMemory):
    """Sequences of bytes from `*.py` files, in a seeded order that is new in each epoch.

    Files are read in the order of their names; every `held_out_every`-th one is held out. The text of each
    part is cut into windows of `seq_length` + 1 bytes that overlap by one, so that every byte is predicted
    once."""

    name = "stdlib_text"

    def __init__(self, config: StdlibTextConfig, *, seq_length: int, vocab_size: int) -> None:
        if vocab_size < BYTES:
            raise DataError(
                f"data=stdlib_text has {BYTES} tokens (bytes), and model.vocab_size={vocab_size}.",
                key="model.vocab_size",
                value=vocab_size,
                allowed=[f">= {BYTES}"],
            )
        self.seq_length = seq_length
        self._seed = config.seed
        root = Path(config.path) if config.path is not None else Path(sysconfig.get_path("stdlib"))
        train, held_out, files = _read(root, config)
        self._train, self._held_out = _windowed(train, seq_length), _windowed(held_out, seq_length)
        self.fingerprint = hashlib.sha256(
            b"|".join(
                [hashlib.sha256(train).digest(), hashlib.sha256(held_out).digest()]
                + [str(number).encode() for number in (seq_length, config.seed)]
            )
        ).hexdigest()
        self.description = (
            f"{files} files of {root}: {len(self._train)} sequences, {len(self._held_out)} more held out"
        )
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def train(self, number: int) -> torch.Tensor:
        epoch, position = divmod(number, len(self._train))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed + epoch)
            self._order = torch.randperm(len(self._train), generator=generator)
            self._epoch = epoch
        return self._train[int(self._order[position])].to(torch.int64)

    def held_out(self, number: int) -> torch.Tensor:
        return self._held_out[number % len(self._held_out)].to(torch.int64)


def _read(root: Path, config: StdlibTextConfig) -> tuple[bytes, bytes, int]:
    """Training text, held-out text, number of files: at most `max_bytes` together."""
    if not root.is_dir():
        raise DataError(
            f"There is no directory {root} to read text from.",
            key="data.path",
            value=str(root),
            hint="Set data.path to a directory of text files, or use data=mock.",
        )
    paths = sorted(_find(root, config.pattern), key=lambda path: path.as_posix())
    train, held_out = bytearray(), bytearray()
    room = config.max_bytes
    used = 0
    for path in paths:
        if room <= 0:
            break
        try:
            text = path.read_bytes()[:room]
        except OSError as error:
            raise DataError(
                f"Cannot read {path}: {error.strerror}.", key="data.path", value=str(root)
            ) from error
        used += 1
        (held_out if used % config.held_out_every == 0 else train).extend(text)
        room -= len(text)
    if not train or not held_out:
        raise DataError(
            f"{root} has {used} files like {config.pattern} with {len(train) + len(held_out)} bytes: too "
            f"little to train on and to hold out every {config.held_out_every}th file.",
            key="data.path",
            value=str(root),
            hint="Set a larger data.max_bytes or a smaller data.held_out_every."
            if room <= 0
            else "Some distributions install Python without its sources: set data.path, or use data=mock.",
        )
    return bytes(train), bytes(held_out), used


def _find(root: Path, pattern: str) -> Iterator[Path]:
    """Files below `root` whose name matches `pattern`, without descending into what is skipped."""
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in SKIPPED_DIRECTORIES]
        yield from (Path(directory, name) for name in fnmatch.filter(names, pattern))


def _windowed(text: bytes, seq_length: int) -> torch.Tensor:
    """uint8 [number of windows, seq_length + 1], a view of the text; a shorter rest at the end is dropped."""
    if len(text) < seq_length + 1:
        raise DataError(
            f"The text has {len(text)} bytes, less than one sequence: "
            f"model.seq_length={seq_length} and one more.",
            key="model.seq_length",
            value=seq_length,
            allowed=[f"< {len(text)}"],
        )
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).unfold(0, seq_length + 1, seq_length)
