"""TensorBoard, through the tensorboard package's own writer: no TensorFlow and no torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_fp8_recipes.telemetry.series import StepValues
from nemo_fp8_recipes.telemetry.sinks.base import Sink

__all__ = ["TensorBoardSink"]

_NAMES = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "step_time_ms": "train/step_time_ms",
}


class TensorBoardSink(Sink):
    """Scalars `fp8/<module>/<tensor>/<stat>` and `train/<metric>`, one event a step. Windows are left out."""

    name = "tensorboard"

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writer: Any = None

    def values(self, values: StepValues) -> None:
        self._add(
            values.step,
            {series.tag: float(value) for series, value in zip(values.series, values.values, strict=True)},
        )

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self._add(step, {_NAMES.get(name, f"train/{name}"): float(value) for name, value in metrics.items()})

    def truncate_after(self, step: int) -> None:
        from tensorboard.compat.proto import event_pb2

        if not self._directory.exists():
            return
        # TensorBoard then hides what earlier event files hold from this step on.
        started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._open().add_event(event_pb2.Event(wall_time=time.time(), step=step + 1, session_log=started))

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _add(self, step: int, scalars: Mapping[str, float]) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2

        if not scalars:
            return
        summary = summary_pb2.Summary(
            value=[summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        )
        self._open().add_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))

    def _open(self) -> Any:
        if self._writer is None:
            from tensorboard.summary.writer.event_file_writer import EventFileWriter

            self._writer = EventFileWriter(str(self._directory))
        return self._writer
