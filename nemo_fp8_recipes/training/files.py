"""Writing files of a run so that a reader never meets half of one, and a failed write is one clear error."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_fp8_recipes.errors import RunDirectoryError

__all__ = ["atomic_write_json", "atomic_write_text", "writing"]


_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an `OSError` (no permission, no space, read-only) into a `RunDirectoryError` that names `path`."""
    try:
        yield
    except OSError as error:
        raise RunDirectoryError(
            f"Cannot write {path}: {error.strerror or error}.",
            key="run_dir",
            value=str(path),
            hint="Make room there and go on with training.resume=PATH, or choose another run_dir=PATH."
            if error.errno in _FULL
            else "Choose a directory that you may write to: run_dir=PATH.",
        ) from error


def atomic_write_text(path: Path, text: str) -> None:
    """Replace `path` by a file holding `text`: readers see the old content or the new, also after a crash."""
    with writing(path):
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def atomic_write_json(path: Path, value: Any) -> None:
    """`atomic_write_text` of `value` as indented JSON; NaN and Inf, which JSON lacks, are refused."""
    atomic_write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
