"""Text to token ids: a Hugging Face `tokenizer.json`, or the bytes of the text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nemo_fp8_recipes.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["ByteTokenizer", "FileTokenizer", "Tokenizer", "load"]

# How tokenizers in use name the token that ends a document, first match first.
_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<eod>")


class Tokenizer(Protocol):
    """Turns documents into token ids and knows which token ends one."""

    vocab_size: int
    end: int
    """Id of the token written after each document."""
    description: dict[str, Any]
    """What it is, for the description beside the files."""

    def encode(self, texts: Sequence[str]) -> list[np.ndarray[Any, Any]]:
        """The token ids of each text, without the end token: int64 [tokens]."""
        ...


class ByteTokenizer:
    """A token a byte of UTF-8. Byte 0, which no text holds, ends a document: 256 tokens in all."""

    vocab_size = 256
    end = 0

    def __init__(self) -> None:
        self.description: dict[str, Any] = {"kind": "bytes", "end": "byte 0"}

    def encode(self, texts: Sequence[str]) -> list[np.ndarray[Any, Any]]:
        import numpy as np

        encoded = [text.encode() for text in texts]
        for document in encoded:
            if 0 in document:
                raise DataError(
                    "A document holds byte 0, which ends documents: this is no text.",
                    hint="Leave that file out, or use a tokenizer file: --tokenizer.",
                )
        return [np.frombuffer(document, dtype=np.uint8).astype(np.int64) for document in encoded]


class FileTokenizer:
    """The tokenizer of a Hugging Face `tokenizer.json`, run by the library `tokenizers`.

    Args:
        path: the file, or a directory that holds it.
        end: the token after each document; None: the first of the usual names that the vocabulary has.

    Raises:
        ConfigError: the library or the file is missing, or no token ends documents.
    """

    def __init__(self, path: Path, end: str | None = None) -> None:
        try:
            from tokenizers import Tokenizer as Library
        except ImportError as error:
            raise ConfigError(
                f"--tokenizer={path} needs the library tokenizers, which is not installed.",
                key="--tokenizer",
                hint="pip install 'nemo-fp8-recipes[data]', or --tokenizer=bytes.",
            ) from error
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            content = file.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"Cannot read the tokenizer {file}: {error.strerror}.", key="--tokenizer", value=str(path)
            ) from error
        try:
            self._library = Library.from_str(content.decode())
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(
                f"{file} is no tokenizer.json of Hugging Face: {error}.",
                key="--tokenizer",
                value=str(path),
                hint="A tokenizer in another format can be saved as one by the library transformers.",
            ) from error
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        name = end or next((token for token in _END_TOKENS if token in vocabulary), None)
        if name is None or name not in vocabulary:
            raise ConfigError(
                f"{file} has no token {end!r}."
                if end
                else f"{file} has none of the usual tokens that end a document.",
                key="--end",
                value=end,
                allowed=None if end else _END_TOKENS,
                hint="Name a token of its vocabulary: --end=TOKEN.",
            )
        self.end = int(vocabulary[name])
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps
        self.description: dict[str, Any] = {
            "kind": "tokenizer.json",
            "path": str(file.resolve()),
            "sha256": hashlib.sha256(content).hexdigest(),
            "end": name,
        }

    def encode(self, texts: Sequence[str]) -> list[np.ndarray[Any, Any]]:
        import numpy as np

        encoded = self._library.encode_batch(list(texts), add_special_tokens=False)
        return [np.asarray(one.ids, dtype=np.int64) for one in encoded]


def load(name: str, end: str | None = None) -> Tokenizer:
    """`bytes`, or the path of a tokenizer file.

    Raises:
        ConfigError: see `FileTokenizer`; an end token named for bytes.
    """
    if name != "bytes":
        return FileTokenizer(Path(name), end)
    if end is not None:
        raise ConfigError("--tokenizer=bytes ends documents by byte 0: leave --end out.", key="--end")
    return ByteTokenizer()
