"""TensorBoard, with the tensorboard package's messages: no TensorFlow and no torch."""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nemo_fp8_recipes.telemetry.series import Series, StepValues
from nemo_fp8_recipes.telemetry.sinks.base import Sink
from nemo_fp8_recipes.telemetry.sinks.event_file import EventFile, record
from nemo_fp8_recipes.telemetry.sinks.scalars import alert_counts, metric_names, value_scalars

__all__ = ["SummaryWriterSink", "TensorBoardSink"]


class TensorBoardSink(Sink):
    """Scalars `fp8/<module>/<tensor>/<stat>` and `train/<metric>`, one event a step. Windows are left out.
    An alert is a scalar `alerts/<rule>`, the number of tensors, and a text of the same name.
    """

    name = "tensorboard"

    _MOST = 64
    """Events that wait, at most. They are made together: alone, between the steps of a training, each finds
    nothing of what it needs in the caches.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file: EventFile | None = None
        self._events = _StepEvents()
        self._metrics = _MetricEvents()
        self._waiting: list[tuple[float, StepValues | tuple[int, dict[str, float]]]] = []
        """What was taken and when, in seconds since 1970: values of steps, or a step with its metrics."""

    def values(self, values: StepValues) -> None:
        if len(values.series) or values.alerts:
            self._take(values)

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        if metrics:
            self._take((step, metric_names(metrics)))

    def truncate_after(self, step: int) -> None:
        from tensorboard.compat.proto import event_pb2

        self._write()
        if not self._directory.exists():
            return
        # TensorBoard then hides what earlier event files hold from this step on.
        started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._open().add(event_pb2.Event(wall_time=time.time(), step=step + 1, session_log=started))

    def flush(self) -> None:
        self._write()
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        self._write()
        if self._file is not None:
            self._file.close()
            self._file = None

    def unwritten(self) -> int:
        return sum(len(taken if isinstance(taken, StepValues) else taken[1]) for _, taken in self._waiting)

    def _take(self, taken: StepValues | tuple[int, dict[str, float]]) -> None:
        # First what may fail: the call then comes again.
        if len(self._waiting) >= self._MOST:
            self._write()
        self._waiting.append((time.time(), taken))

    def _write(self) -> None:
        """Give the file what waits."""
        if not self._waiting:
            return
        file = self._open()
        events = [
            self._events.of(taken, at) if isinstance(taken, StepValues) else self._metrics.of(*taken, at)
            for at, taken in self._waiting
        ]
        file.write(b"".join(map(record, events)))
        self._waiting = []

    def _open(self) -> EventFile:
        if self._file is None:
            self._file = EventFile(self._directory)
        return self._file


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


class _StepEvents:
    """The serialised events of steps. Those that hold the same series share one in which the numbers are
    exchanged: making hundreds of messages anew takes longer than the rest of a logging step.
    """

    _KEPT = 8

    def __init__(self) -> None:
        self._known: dict[int, tuple[tuple[Series, ...], _SerializedScalars]] = {}

    def of(self, values: StepValues, at: float) -> bytes:
        """The event of a step, at this time."""
        if values.alerts:
            return _serialized(values.step, _summary(values), at)
        known = self._known.get(id(values.series))
        if known is not None:
            return known[1].event(values.step, values.values, at)
        summary = _summary(values)
        # Series of one name, as of two recipes in one step, share a scalar; these are told apart anew.
        if len(summary.value) == len(values.series):
            if len(self._known) >= self._KEPT:
                self._known.clear()
            self._known[id(values.series)] = (values.series, _SerializedScalars(summary))
        return _serialized(values.step, summary, at)


class _MetricEvents:
    """The serialised events of training metrics, made as those of values: most steps have the same ones."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._known: _SerializedScalars | None = None

    def of(self, step: int, metrics: Mapping[str, float], at: float) -> bytes:
        """The event of a step with these scalars, at this time."""
        names = tuple(metrics)
        if self._known is None or names != self._names:
            self._names, self._known = names, _SerializedScalars(_scalars(metrics))
        return self._known.event(step, np.fromiter(metrics.values(), np.float32, len(metrics)), at)


class _SerializedScalars:
    """A serialised summary of scalars, and where its numbers are.

    Fields are serialised in the order of their numbers (`tensorboard/compat/proto/summary.proto`): in
    `Summary.Value` the tag, 1, comes before simple_value, 2, whose fp32 is then the last four bytes; in
    `Event` wall_time, 1, and step, 2, come before summary, 5.
    """

    def __init__(self, summary: Any) -> None:
        lengths = np.asarray([value.ByteSize() for value in summary.value], dtype=np.int64)
        prefixes = 1 + np.asarray([len(_varint(length)) for length in lengths.tolist()], dtype=np.int64)
        ends = np.cumsum(prefixes + lengths)
        self._places = ends[:, None] - 4 + np.arange(4)
        content = summary.SerializeToString()
        self._bytes = np.frombuffer(content, dtype=np.uint8).copy()
        self._prefix = b"\x2a" + _varint(len(content))

    def event(self, step: int, values: np.ndarray, at: float) -> bytes:
        """The event of `step` with these numbers, fp32 (scalars,), at this time."""
        self._bytes[self._places] = values.astype("<f4", copy=False).view(np.uint8).reshape(-1, 4)
        # The tags are field << 3 | type: 1 is eight bytes, 0 a varint.
        head = struct.pack("<Bd", 0x09, at)
        return b"".join((head, b"\x10", _varint(step), self._prefix, self._bytes.tobytes()))


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the highest bit says that more follow."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


def _serialized(step: int, summary: Any, at: float) -> bytes:
    from tensorboard.compat.proto import event_pb2

    event = event_pb2.Event(wall_time=at, step=step, summary=summary)
    data: bytes = event.SerializeToString()
    return data


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
