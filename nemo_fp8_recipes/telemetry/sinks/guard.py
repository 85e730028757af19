"""A sink that fails must not stop the training: it is retried, then switched off, and the loss is counted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from nemo_fp8_recipes.telemetry.series import StepValues
from nemo_fp8_recipes.telemetry.sinks.base import Sink

__all__ = ["GuardedSink"]

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""How often one call is tried before the sink is switched off."""


class GuardedSink(Sink):
    """Calls another sink and survives its failure.

    Attributes:
        error: what made it fail for good, None while it works.
        lost: values and metrics it took but did not write, or was not given any more.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.name = sink.name
        self.error: Exception | None = None
        self.lost = 0

    def values(self, values: StepValues) -> None:
        self._call(lambda: self._sink.values(values), len(values))

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self._call(lambda: self._sink.metrics(step, metrics), len(metrics))

    def truncate_after(self, step: int) -> None:
        self._call(lambda: self._sink.truncate_after(step), 0)

    def flush(self) -> None:
        self._call(self._sink.flush, 0)

    def close(self) -> None:
        self._call(self._sink.close, 0)
        if self.lost:
            logger.warning(
                "Telemetry sink %s lost %d values; it stopped because of %s: %s",
                self.name,
                self.lost,
                type(self.error).__name__,
                self.error,
            )

    def read(self, stat: str, modules: Iterable[str]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        self._call(lambda: found.extend(self._sink.read(stat, modules)), 0)
        return found

    def unwritten(self) -> int:
        return self._sink.unwritten()

    def _call(self, call: Callable[[], None], values: int) -> None:
        if self.error is not None:
            self.lost += values
            return
        for attempt in range(ATTEMPTS):
            try:
                call()
            except Exception as error:  # noqa: BLE001 - whatever a sink raises, the training goes on
                if attempt + 1 < ATTEMPTS:
                    continue
                # What was taken and not written is lost as well; the values of this call may be among it.
                self.lost += max(values, self._sink.unwritten())
                self.error = error
                logger.warning(
                    "Telemetry sink %s is switched off after %d attempts: %s: %s. Training goes on; %d "
                    "values are lost so far, and all later ones will be.",
                    self.name,
                    ATTEMPTS,
                    type(error).__name__,
                    error,
                    self.lost,
                )
            else:
                return
