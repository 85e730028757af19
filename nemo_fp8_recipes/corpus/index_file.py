"""The two files of a Megatron dataset: PREFIX.bin holds the tokens of all documents one after the other,
PREFIX.idx their lengths. Format: megatron/core/datasets/indexed_dataset.py.

    .idx: "MMIDIDX\\0\\0", version 1 (u64), dtype code (u8), number of sequences S (u64), number of document
    boundaries D (u64), S lengths in tokens (i32), S byte offsets into .bin (i64), D boundaries (i64), all
    little-endian.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_fp8_recipes.errors import DataError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["IndexFile", "index_bytes", "paths", "token_dtype"]

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<QBQQ")
_CODES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
_SMALL_VOCABULARY = 65500  # DType.optimal_dtype: below it two bytes hold a token
_SAMPLE = 1 << 20  # bytes at either end of a file that tell it from another one


def paths(prefix: str | Path) -> tuple[Path, Path]:
    """The .bin and the .idx file of a prefix."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest type that Megatron stores tokens of such a vocabulary in."""
    import numpy as np

    return np.dtype(np.uint16 if vocab_size < _SMALL_VOCABULARY else np.int32)


def index_bytes(lengths: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> bytes:
    """The content of an .idx file for documents of `lengths` tokens, int [documents], one sequence each."""
    import numpy as np

    code = next(code for code, name in _CODES.items() if name == dtype.name)
    ends = np.cumsum(lengths, dtype=np.int64)
    offsets = (ends - lengths) * dtype.itemsize
    boundaries = np.arange(len(lengths) + 1, dtype=np.int64)
    return b"".join(
        [
            _MAGIC,
            _HEADER.pack(1, code, len(lengths), len(boundaries)),
            lengths.astype("<i4").tobytes(),
            offsets.astype("<i8").tobytes(),
            boundaries.astype("<i8").tobytes(),
        ]
    )


@dataclass(frozen=True)
class IndexFile:
    """What an .idx file says, checked against the .bin file beside it."""

    prefix: str
    dtype: np.dtype[Any]
    lengths: np.ndarray[Any, Any]
    """Tokens of each sequence: int32 [sequences]."""

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum(dtype="int64"))

    @classmethod
    def read(cls, prefix: str) -> IndexFile:
        """Read PREFIX.idx.

        Raises:
            DataError: one of the two files is missing, or they are not the two files of one dataset.
        """
        import numpy as np

        bin_file, idx_file = paths(prefix)
        try:
            size = bin_file.stat().st_size
            content = np.memmap(idx_file, mode="r")
        except (OSError, ValueError) as error:  # numpy refuses to map an empty file by ValueError
            missing = error.filename if isinstance(error, FileNotFoundError) else idx_file
            raise DataError(
                f"Cannot read {missing}: {error.strerror if isinstance(error, OSError) else error}.",
                key="data.blend",
                value=prefix,
                hint=_hint(prefix),
            ) from error
        start = len(_MAGIC) + _HEADER.size
        if len(content) < start or content[: len(_MAGIC)].tobytes() != _MAGIC:
            raise _broken(idx_file, prefix, "it does not begin as one")
        version, code, sequences, boundaries = _HEADER.unpack(content[len(_MAGIC) : start].tobytes())
        if version != 1 or code not in _CODES:
            raise _broken(idx_file, prefix, f"it has version {version} and tokens of type {code}")
        if len(content) < start + (4 + 8) * sequences + 8 * boundaries:
            raise _broken(idx_file, prefix, "it is cut off")
        lengths = np.frombuffer(content, dtype="<i4", count=sequences, offset=start)
        if sequences and lengths.min() < 0:
            raise _broken(idx_file, prefix, "a sequence has fewer than 0 tokens")
        dtype = np.dtype(_CODES[code])
        index = cls(prefix, dtype, lengths)
        if index.tokens * dtype.itemsize != size:
            raise _broken(
                idx_file,
                prefix,
                f"it counts {index.tokens} tokens of {dtype.itemsize} bytes, and {bin_file.name} has {size} "
                "bytes",
            )
        return index

    def digest(self) -> str:
        """A short name for what the two files hold: their sizes and both ends of each."""
        digest = hashlib.blake2b(digest_size=16)
        for path in paths(self.prefix):
            size = path.stat().st_size
            digest.update(f"{size}|".encode())
            with path.open("rb") as file:
                digest.update(file.read(_SAMPLE))
                file.seek(max(0, size - _SAMPLE))
                digest.update(file.read(_SAMPLE))
        return digest.hexdigest()


def _broken(path: Path, prefix: str, why: str) -> DataError:
    return DataError(f"{path} is no index of a Megatron dataset: {why}.", key="data.blend", value=prefix)


def _hint(prefix: str) -> str:
    if prefix.endswith((".bin", ".idx")):
        return f"Give the path without its ending: {prefix[:-4]}."
    return "Make both files from text: nemo-fp8 data --help."
