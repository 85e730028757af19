"""Files of one JSON object a line, each with a `step`, that a killed process may leave with half a line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["append_lines", "read_lines", "truncate_lines"]


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append all rows or none; raises OSError where that cannot be done."""
    lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    if not lines:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        end = file.tell()
        try:
            file.write(lines.encode())
            file.flush()
        except OSError:
            os.truncate(path, end)  # the call comes again, and half a line must not stay before it
            raise


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines; empty without a file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    # The text after the last newline is a line that a killed process left half-written.
    return [json.loads(line) for line in text.split("\n")[:-1]]


def truncate_lines(path: Path, step: int) -> None:
    """Keep the complete lines of the steps up to `step`. Atomic."""
    if not path.exists():
        return
    kept = [row for row in read_lines(path) if row["step"] <= step]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    temporary.replace(path)
