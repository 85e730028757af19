"""JSON lines: one object a logging step, for a reader without Parquet."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from nemo_fp8_recipes.telemetry.series import StepValues
from nemo_fp8_recipes.telemetry.sinks.base import Sink
from nemo_fp8_recipes.telemetry.store.lines import append_lines, truncate_lines

__all__ = ["JsonLinesSink"]


class JsonLinesSink(Sink):
    """`{"step": 10, "values": {"fp8/…/amax": 1.5, …}}`, with `"alerts": [{…}]` where there are any. Windows
    are left out; NaN and Inf, which JSON lacks, are the strings "NaN", "Infinity" and "-Infinity".
    """

    name = "jsonl"

    def __init__(self, path: Path) -> None:
        self._path = path

    def values(self, values: StepValues) -> None:
        row: dict[str, Any] = {
            "step": values.step,
            "values": {
                series.tag: _number(value)
                for series, value in zip(values.series, values.values.tolist(), strict=True)
            },
        }
        if values.alerts:
            row["alerts"] = [alert.to_dict() for alert in values.alerts]
        append_lines(self._path, [row])

    def truncate_after(self, step: int) -> None:
        truncate_lines(self._path, step)


def _number(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
