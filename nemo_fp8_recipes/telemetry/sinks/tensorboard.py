"""TensorBoard, through the tensorboard package's own writer: no TensorFlow and no torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_fp8_recipes.telemetry.series import StepValues
from nemo_fp8_recipes.telemetry.sinks.base import Sink
from nemo_fp8_recipes.telemetry.sinks.scalars import alert_counts, metric_names, value_scalars

__all__ = ["SummaryWriterSink", "TensorBoardSink"]


class TensorBoardSink(Sink):
    """Scalars `fp8/<module>/<tensor>/<stat>` and `train/<metric>`, one event a step. Windows are left out.
    An alert is a scalar `alerts/<rule>`, the number of tensors, and a text of the same name.
    """

    name = "tensorboard"

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writer: Any = None

    def values(self, values: StepValues) -> None:
        self._add(values.step, _summary(values))

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        if metrics:
            self._add(step, _scalars(metric_names(metrics)))

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

    def _add(self, step: int, summary: Any) -> None:
        from tensorboard.compat.proto import event_pb2

        if summary.value:
            self._open().add_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))

    def _open(self) -> Any:
        if self._writer is None:
            from tensorboard.summary.writer.event_file_writer import EventFileWriter

            self._writer = EventFileWriter(str(self._directory))
        return self._writer


class SummaryWriterSink(Sink):
    """The SummaryWriter (`torch.utils.tensorboard` or tensorboardX) that the training job has. It stays the
    job's own: it is flushed but not closed, and training metrics are left to the job.
    """

    name = "SummaryWriter"

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def values(self, values: StepValues) -> None:
        summary = _summary(values)
        if summary.value:
            # One event for the whole step: add_scalar would make one of every number.
            self._writer.file_writer.add_summary(summary, values.step)

    def flush(self) -> None:
        self._writer.flush()


def _summary(values: StepValues) -> Any:
    from tensorboard.plugins.text.summary_v2 import text_pb

    summary = _scalars({**value_scalars(values), **alert_counts(values)})
    for alert in values.alerts:
        text = text_pb(f"alerts/{alert.rule}/text", alert.message)
        summary.value.extend(text.value)
    return summary


def _scalars(scalars: Mapping[str, float]) -> Any:
    from tensorboard.compat.proto import summary_pb2

    return summary_pb2.Summary(
        value=[summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
    )
