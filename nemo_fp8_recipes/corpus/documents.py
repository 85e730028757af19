"""Documents from text files."""

from __future__ import annotations

import fnmatch
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, cast

from nemo_fp8_recipes.errors import DataError

__all__ = ["Documents", "find_files"]


def find_files(sources: Sequence[str], patterns: Sequence[str]) -> list[Path]:
    """The files among `sources`, and below the directories among them those whose names match a pattern,
    in the order given and by name within a directory.

    Raises:
        DataError: a source does not exist, or nothing is found.
    """
    found: list[Path] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            inside = (Path(parent, name) for parent, _, names in os.walk(path) for name in names)
            found += sorted(p for p in inside if any(fnmatch.fnmatch(p.name, one) for one in patterns))
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f"There is no file or directory {source}.", value=source)
    if not found:
        raise DataError(
            f"No file in {', '.join(sources)} is named like {', '.join(patterns)}.", hint="See --pattern."
        )
    return found


@dataclass(frozen=True)
class Documents:
    """The documents of `files`, in their order.

    `.jsonl` files hold a JSON object a line, whose `field` is a document. Of other files, each is one
    document, or with `unit="line"` each line is. Files ending in `.gz` are unpacked.
    """

    files: Sequence[Path]
    unit: Literal["file", "line"] = "file"
    field: str = "text"

    def __iter__(self) -> Iterator[tuple[Path, str]]:
        """Each document with the file that it is from.

        Raises:
            DataError: a file cannot be read, is not UTF-8, or a line is not such an object.
        """
        for path in self.files:
            try:
                with _open(path) as file:
                    for text in self._of(path, file):
                        yield path, text
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.", value=str(path)
                ) from error
            except (OSError, EOFError, zlib.error) as error:
                raise DataError(f"Cannot read {path}: {error}.", value=str(path)) from error

    def _of(self, path: Path, file: IO[str]) -> Iterator[str]:
        if ".jsonl" in path.suffixes[-2:]:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield self._field(path, number, line)
        elif self.unit == "line":
            for line in file:
                if line.strip():
                    yield line.rstrip("\r\n")
        else:
            yield file.read()

    def _field(self, path: Path, number: int, line: str) -> str:
        try:
            text = json.loads(line)[self.field]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            text = error
        if not isinstance(text, str):
            raise DataError(
                f"Line {number} of {path} is no JSON object with a text in '{self.field}'.",
                value=str(path),
                hint="Name the field that holds the text: --field=NAME.",
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"Line {number} of {path} is no text in '{self.field}': {error.reason} (half of a pair).",
                value=str(path),
            ) from error
        return text


def _open(path: Path) -> IO[str]:
    """The file as UTF-8 text with its line ends as they are."""
    if path.suffix == ".gz":
        return cast("IO[str]", gzip.open(path, "rt", encoding="utf-8", newline=""))
    return path.open(encoding="utf-8", newline="")
