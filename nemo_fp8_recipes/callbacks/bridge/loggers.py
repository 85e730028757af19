"""Telemetry in the loggers that Bridge's user has configured: TensorBoard and Weights & Biases.

Bridge keeps both on the last rank.
"""

from __future__ import annotations

from typing import Any

from nemo_fp8_recipes.telemetry.series import StepValues
from nemo_fp8_recipes.telemetry.sinks.base import Sink

__all__ = ["BridgeLoggers"]


class BridgeLoggers(Sink):
    """Writes `fp8/<module>/<tensor>/<stat>` beside Bridge's own scalars, at the iteration it calls the same.

    Bridge writes the training metrics itself. Windows are left out.
    """

    name = "bridge"

    def __init__(self, state: Any) -> None:
        self._tensorboard = state.tensorboard_logger
        self._wandb = state.wandb_logger

    def __bool__(self) -> bool:
        """Whether this rank has a logger to write to."""
        return self._tensorboard is not None or self._wandb is not None

    def values(self, values: StepValues) -> None:
        scalars = {
            series.tag: float(value) for series, value in zip(values.series, values.values, strict=True)
        }
        if self._tensorboard is not None:
            for tag, value in scalars.items():
                self._tensorboard.add_scalar(tag, value, values.step)
        if self._wandb is not None:
            # Values arrive a step late; without `step` W&B files them under its newest step, which is later.
            self._wandb.log({**scalars, "fp8/step": values.step})

    def flush(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.flush()
