"""Documents in, a Megatron dataset out: PREFIX.bin, PREFIX.idx, and PREFIX.json, which describes them."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_fp8_recipes.corpus.index_file import index_bytes, paths, token_dtype
from nemo_fp8_recipes.corpus.tokenizer import Tokenizer
from nemo_fp8_recipes.errors import DataError

__all__ = ["Built", "build", "description_path", "read_description", "refuse_existing"]

SCHEMA_VERSION = 1
_BATCH = 256  # documents that are tokenized together


@dataclass(frozen=True)
class Built:
    """What was written."""

    documents: int
    tokens: int
    empty: int
    """Documents without a token, which were left out."""


def description_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.json")


def read_description(prefix: str | Path) -> dict[str, Any] | None:
    """PREFIX.json; None where another tool made the dataset. Raises `DataError` for one that is broken."""
    path = description_path(prefix)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read {path}: {error}.", value=str(path)) from error
    is_ours = isinstance(record, dict) and record.get("schema_version") == SCHEMA_VERSION
    return record if is_ours and isinstance(record.get("vocab_size"), int) else None


def refuse_existing(prefix: Path) -> None:
    """Raise `DataError` when one of the three files is there already."""
    for path in (*paths(prefix), description_path(prefix)):
        if path.exists():
            raise DataError(
                f"{path} exists already.",
                value=str(path),
                hint="Choose another --output, or replace it: --overwrite.",
            )


def build(
    documents: Iterable[tuple[Path, str]],
    tokenizer: Tokenizer,
    prefix: Path,
    *,
    progress: Callable[[int, int], None] = lambda _documents, _tokens: None,
) -> Built:
    """Tokenize the documents and write the three files, complete or not at all.

    Args:
        documents: each with the file that it is from.
        prefix: path of the files without their endings; its directory is made.
        progress: called with the numbers of documents and tokens so far.

    Raises:
        DataError: a document cannot be read or tokenized, there is none, or the files cannot be written.
    """
    import numpy as np

    dtype = token_dtype(tokenizer.vocab_size)
    lengths: list[int] = []
    tokens = empty = 0
    bin_path, idx_path = paths(prefix)
    with (
        _written(bin_path) as bin_file,
        _written(idx_path) as idx_file,
        _written(description_path(prefix)) as about,
    ):
        iterator = iter(documents)
        while batch := list(itertools.islice(iterator, _BATCH)):
            for ids in _encode(tokenizer, batch):
                if not len(ids):
                    empty += 1
                    continue
                bin_file.write(np.append(ids, tokenizer.end).astype(dtype).tobytes())
                lengths.append(len(ids) + 1)
                tokens += len(ids) + 1
            progress(len(lengths), tokens)
        if not lengths:
            raise DataError("There is no text in these files.")
        if max(lengths) > np.iinfo(np.int32).max:
            raise DataError(f"A document has {max(lengths)} tokens; the format ends at 2^31 - 1.")
        idx_file.write(index_bytes(np.asarray(lengths, dtype=np.int64), dtype))
        description = {
            "schema_version": SCHEMA_VERSION,
            "documents": len(lengths),
            "tokens": tokens,
            "dtype": dtype.name,
            "vocab_size": tokenizer.vocab_size,
            "end_of_document": tokenizer.end,
            "tokenizer": tokenizer.description,
        }
        about.write((json.dumps(description, indent=2) + "\n").encode())
    return Built(len(lengths), tokens, empty)


def _encode(tokenizer: Tokenizer, batch: list[tuple[Path, str]]) -> list[Any]:
    try:
        return tokenizer.encode([text for _, text in batch])
    except DataError:
        for path, text in batch:  # which one was it?
            try:
                tokenizer.encode([text])
            except DataError as error:
                raise DataError(f"{path}: {error.message}", value=str(path), hint=error.hint) from error
        raise


class _Output:
    """A file that takes its name only at the end."""

    def __init__(self, path: Path) -> None:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        self.path, self.temporary = path, Path(name)
        self._file = os.fdopen(descriptor, "wb")

    def write(self, content: bytes) -> None:
        self._file.write(content)

    def finish(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self.temporary.chmod(0o644)
        self.temporary.replace(self.path)

    def abandon(self) -> None:
        self._file.close()
        self.temporary.unlink(missing_ok=True)


@contextmanager
def _written(path: Path) -> Iterator[_Output]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        output = _Output(path)
        try:
            yield output
            output.finish()
        except BaseException:
            output.abandon()
            raise
    except OSError as error:
        raise DataError(
            f"Cannot write {path}: {error.strerror or error}.", key="--output", value=str(path)
        ) from error
