"""The Parquet store as a sink: steps are held until `flush` writes them as one new file."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nemo_fp8_recipes.telemetry import store
from nemo_fp8_recipes.telemetry.series import StepValues
from nemo_fp8_recipes.telemetry.sinks.base import Sink
from nemo_fp8_recipes.telemetry.store import StoreWriter
from nemo_fp8_recipes.telemetry.store.alerts import AlertLog
from nemo_fp8_recipes.telemetry.store.claim import Claim

__all__ = ["ParquetSink"]

logger = logging.getLogger(__name__)

_FLUSHES = 4
"""After so many it is looked whether files are to be merged."""


class ParquetSink(Sink):
    """Writes `<run_dir>/telemetry/*.parquet` and `alerts.jsonl`, schema in docs/schemas/telemetry.md.

    Small files are merged into larger ones by a thread, so that the training does not wait for it.

    Args:
        run_dir: the run directory.
        metadata: kept in every file: recipe, device, world size, versions.

    Raises:
        RunDirectoryError: another process writes there.
    """

    name = "parquet"

    def __init__(self, run_dir: Path, metadata: Mapping[str, Any]) -> None:
        self._run_dir = run_dir
        self._claim = Claim(run_dir)
        self._writer = StoreWriter(run_dir, metadata)
        self._alerts = AlertLog(run_dir)
        self._waiting: list[StepValues] = []
        self._merging: threading.Thread | None = None
        self._merges = True
        self._flushes = 0

    def values(self, values: StepValues) -> None:
        # Alerts are few, and are wanted at once. First, because only this can fail and be tried again.
        self._alerts.append(values.alerts)
        self._waiting.append(values)

    def truncate_after(self, step: int) -> None:
        self._finish_merging()
        self._waiting = [values for values in self._waiting if values.step <= step]
        self._alerts.truncate_after(step)
        self._writer.truncate_after(step)

    def read(self, stat: str, modules: Iterable[str]) -> list[dict[str, Any]]:
        columns = ["step", "module", "tensor", "values"]
        rows = store.read(self._run_dir, modules, stat=stat).select(columns).to_pylist()
        return [{**row, "values": np.asarray(row["values"], dtype=np.float32)} for row in rows]

    def flush(self) -> None:
        if not self._waiting:
            return
        self._writer.write(self._waiting)
        self._waiting = []
        self._flushes += 1
        if self._flushes % _FLUSHES or not self._merges:
            return
        if self._merging is not None and self._merging.is_alive():
            return
        if self._writer.mergeable():
            self._merging = threading.Thread(target=self._merge, name="telemetry-merge", daemon=True)
            self._merging.start()

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._finish_merging()
            self._claim.release()

    def unwritten(self) -> int:
        return sum(len(values) for values in self._waiting)

    def _merge(self) -> None:
        try:
            self._writer.compact()
        except Exception as error:  # noqa: BLE001 - the files that should have been merged are all there
            self._merges = False
            logger.warning(
                "The files of the telemetry store are no longer merged: %s: %s. Nothing is lost; reading a "
                "long run takes longer.",
                type(error).__name__,
                error,
            )

    def _finish_merging(self) -> None:
        if self._merging is not None:
            self._merging.join()
            self._merging = None
