"""`metrics.jsonl`: one JSON object a logged step, in the order of the steps."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_fp8_recipes.training.files import atomic_write_text, writing

__all__ = ["MetricsLog", "read_metrics"]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics file; a last line that a killed process left half-written is
    dropped."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    complete, torn = lines[:-1], lines[-1]
    del torn  # text after the last newline: the line was never finished
    return [json.loads(line) for line in complete if line]


class MetricsLog:
    """Appends to `metrics.jsonl`. A number that JSON cannot hold (NaN, Inf) is written as null."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def truncate_after(self, step: int) -> None:
        """Keep the steps up to and including `step`; what a lost continuation logged goes. Atomic."""
        if self.path.exists():
            kept = [row for row in read_metrics(self.path) if row["step"] <= step]
            atomic_write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def append(self, row: Mapping[str, float | int]) -> None:
        finite = {
            key: value if not isinstance(value, float) or math.isfinite(value) else None
            for key, value in row.items()
        }
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")
