"""JSON lines: one object a logging step, for a reader without Parquet."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from nemo_fp8_recipes.telemetry.series import StepValues
from nemo_fp8_recipes.telemetry.sinks.base import Sink

__all__ = ["JsonLinesSink"]


class JsonLinesSink(Sink):
    """`{"step": 10, "values": {"fp8/…/amax": 1.5, …}}`. Windows are left out; NaN and Inf, which JSON lacks,
    are the strings "NaN", "Infinity" and "-Infinity".
    """

    name = "jsonl"

    def __init__(self, path: Path) -> None:
        self._path = path

    def values(self, values: StepValues) -> None:
        row = {
            "step": values.step,
            "values": {
                series.tag: _number(float(value))
                for series, value in zip(values.series, values.values, strict=True)
            },
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(row, allow_nan=False) + "\n"
        with self._path.open("ab") as file:
            end = file.tell()
            try:
                file.write(line.encode())
                file.flush()
            except OSError:
                os.truncate(self._path, end)  # the call comes again, and half a line must not stay before it
                raise

    def truncate_after(self, step: int) -> None:
        if not self._path.exists():
            return
        # The text after the last newline is a line that a killed process left half-written.
        lines = self._path.read_text(encoding="utf-8").split("\n")[:-1]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        temporary.replace(self._path)


def _number(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
