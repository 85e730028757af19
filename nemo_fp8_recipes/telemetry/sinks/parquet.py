"""The Parquet store as a sink: steps are held until `flush` writes them as one new file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_fp8_recipes.telemetry.series import StepValues
from nemo_fp8_recipes.telemetry.sinks.base import Sink
from nemo_fp8_recipes.telemetry.store import StoreWriter
from nemo_fp8_recipes.telemetry.store.alerts import AlertLog

__all__ = ["ParquetSink"]


class ParquetSink(Sink):
    """Writes `<run_dir>/telemetry/*.parquet` and `alerts.jsonl`, schema in docs/schemas/telemetry.md.

    Args:
        run_dir: the run directory.
        metadata: kept in every file: recipe, device, world size, versions.
    """

    name = "parquet"

    def __init__(self, run_dir: Path, metadata: Mapping[str, Any]) -> None:
        self._writer = StoreWriter(run_dir, metadata)
        self._alerts = AlertLog(run_dir)
        self._waiting: list[StepValues] = []

    def values(self, values: StepValues) -> None:
        # Alerts are few, and are wanted at once. First, because only this can fail and be tried again.
        self._alerts.append(values.alerts)
        self._waiting.append(values)

    def truncate_after(self, step: int) -> None:
        self._waiting = [values for values in self._waiting if values.step <= step]
        self._alerts.truncate_after(step)
        self._writer.truncate_after(step)

    def flush(self) -> None:
        if self._waiting:
            self._writer.write(self._waiting)
            self._waiting = []
            self._writer.compact()

    def close(self) -> None:
        self.flush()

    def unwritten(self) -> int:
        return sum(len(values) for values in self._waiting)
