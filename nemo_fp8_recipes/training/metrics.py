"""`metrics.jsonl`: one JSON object a logged step, in the order of the steps."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_fp8_recipes.errors import RunDirectoryError
from nemo_fp8_recipes.training.files import atomic_write_text, writing

__all__ = ["MetricsLog", "read_metrics"]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics file, none where there is no file; a last line that a killed process
    left half-written is dropped.

    Raises:
        RunDirectoryError: it cannot be read, or a complete line is no JSON object with a step.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunDirectoryError(f"Cannot read {path}: {error.strerror or error}.", value=str(path)) from error
    complete, torn = lines[:-1], lines[-1]
    del torn  # text after the last newline: the line was never finished
    return [_row(path, number, line) for number, line in enumerate(complete, start=1) if line]


def _row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise RunDirectoryError(
            f"{path} is damaged: line {number} is no JSON object with a step.",
            value=str(path),
            hint="Take the line out to go on with the others.",
        )
    return row


class MetricsLog:
    """Appends to `metrics.jsonl`. A number that JSON cannot hold (NaN, Inf) is written as null."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def truncate_after(self, step: int) -> list[int]:
        """Keep the steps up to and including `step`; what a lost continuation logged goes. Atomic.

        Returns:
            The steps that are left.
        """
        kept = [row for row in read_metrics(self.path) if row["step"] <= step]
        if self.path.exists():
            atomic_write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        return [row["step"] for row in kept]

    def append(self, row: Mapping[str, float | int]) -> None:
        finite = {
            key: value if not isinstance(value, float) or math.isfinite(value) else None
            for key, value in row.items()
        }
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")
