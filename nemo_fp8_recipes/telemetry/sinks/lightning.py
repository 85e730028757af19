"""A Lightning logger that the trainer has: `trainer.logger`, NeMo's loggers included."""

from __future__ import annotations

from typing import Any

from nemo_fp8_recipes.telemetry.series import StepValues
from nemo_fp8_recipes.telemetry.sinks.base import Sink
from nemo_fp8_recipes.telemetry.sinks.scalars import alert_counts, value_scalars

__all__ = ["LightningSink"]


class LightningSink(Sink):
    """Calls `logger.log_metrics` once a logging step. The logger stays the trainer's: it saves and closes it,
    and training metrics reach it from there. An alert is `alerts/<rule>`, the number of tensors.
    """

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self.name = type(logger).__name__

    def values(self, values: StepValues) -> None:
        scalars = {**value_scalars(values), **alert_counts(values)}
        if scalars:
            self._logger.log_metrics(scalars, step=values.step)
