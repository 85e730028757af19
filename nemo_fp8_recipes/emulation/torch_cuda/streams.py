"""Streams and events. Host operations are finished when they return, so every wait is satisfied already."""

# ruff: noqa: ARG001, ARG002 -- the signatures are torch's

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from nemo_fp8_recipes.emulation.ledger import PatchLedger

__all__ = ["Event", "Stream", "StreamContext", "apply"]


class Stream:
    """`torch.cuda.Stream`: all streams are the one order in which the host executes."""

    device_index = 0
    device_type = 1
    cuda_stream = 0
    stream_id = 0

    def __init__(self, device: Any = None, priority: int = 0, **_kwargs: Any) -> None:
        self.priority = priority

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0)

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, -1)

    def wait_event(self, event: Any) -> None:
        return None

    def wait_stream(self, stream: Any) -> None:
        return None

    def record_event(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return None

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_exception: object) -> None:
        return None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return hash(self.cuda_stream)


class Event:
    """`torch.cuda.Event` on the host's clock: elapsed times are times of the emulation, never of a GPU."""

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False
    ) -> None:
        self.enable_timing = enable_timing
        self._recorded: float | None = None

    def record(self, stream: Any = None) -> None:
        self._recorded = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        return None

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return None

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds between the two records."""
        if self._recorded is None or end_event._recorded is None:
            raise RuntimeError("Both events must be recorded before calculating elapsed time.")
        return 1e3 * (end_event._recorded - self._recorded)


class StreamContext:
    """`torch.cuda.StreamContext`: a class, since torch.compile asks whether a value is one."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_exception: object) -> None:
        return None


_THE_STREAM = Stream()


def _of_any_kind() -> tuple[Callable[..., Any], ...]:
    """New functions in every call: torch.compile tells those of torch.cuda and torch.accelerator apart."""

    def current_stream(device: Any = None) -> Stream:
        return _THE_STREAM

    def set_stream(stream: Any) -> None:
        return None

    def synchronize(device: Any = None) -> None:
        return None

    return current_stream, set_stream, synchronize


def apply(ledger: PatchLedger) -> None:
    """Stand in for streams, events, synchronisation, capture queries and NVTX ranges."""

    def default_stream(device: Any = None) -> Stream:
        return _THE_STREAM

    def stream(stream: Any) -> StreamContext:
        return StreamContext(stream)

    def is_current_stream_capturing() -> bool:
        return False

    reason = "there are no CUDA streams"
    for function in (
        *_of_any_kind(),
        default_stream,
        stream,
        is_current_stream_capturing,
    ):
        ledger.set(torch.cuda, function.__name__, function, reason)
    for function in _of_any_kind():
        ledger.set(torch.accelerator, function.__name__, function, "there is no stream of an accelerator")
    ledger.set(torch.cuda, "StreamContext", StreamContext, reason)
    ledger.set(torch.cuda, "Stream", Stream, reason)
    ledger.set(torch.cuda, "ExternalStream", Stream, reason)
    ledger.set(torch.cuda, "Event", Event, reason)

    def __new__(cls: type, *_args: Any, **_options: Any) -> Any:
        raise RuntimeError(
            "A CUDAGraph cannot be made: the device is emulated, and there is nothing to capture."
        )

    ledger.set(torch.cuda.graphs.CUDAGraph, "__new__", __new__, reason)

    def graph_pool_handle() -> Any:
        raise RuntimeError(
            "A pool of CUDA graphs cannot be made: the device is emulated, and there is nothing to capture."
        )

    for module in (torch.cuda, torch.cuda.graphs):
        ledger.set(module, "graph_pool_handle", graph_pool_handle, reason)

    def range_push(msg: str) -> int:
        return 0

    def range_pop() -> int:
        return 0

    def range_start(msg: str) -> int:
        return 0

    def range_end(range_id: int) -> None:
        return None

    def mark(msg: str) -> None:
        return None

    for marker in (range_push, range_pop, range_start, range_end, mark):
        ledger.set(torch.cuda.nvtx, marker.__name__, marker, "NVTX is part of the CUDA build")
