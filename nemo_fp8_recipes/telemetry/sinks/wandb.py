"""Weights & Biases: a run of our own, or the one that the training job has."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.telemetry.series import StepValues
from nemo_fp8_recipes.telemetry.sinks.base import Sink
from nemo_fp8_recipes.telemetry.sinks.scalars import alert_counts, metric_names, value_scalars

__all__ = ["STEP", "WandbSink", "own_run"]

STEP = "fp8/step"
"""The x axis of our curves, whatever the steps of the W&B run count."""


class WandbSink(Sink):
    """One `log` call a logging step. An alert is `alerts/<rule>`, the number of tensors, and a W&B alert.

    Args:
        run: a W&B run, or the module `wandb` with a run in progress (what Megatron calls its writer).
        owned: the run is ours: training metrics go to it, and `close` finishes it. The job's own run gets
            values only; they join the row that the job is filling (`commit=False`), so that its step counter
            stays as it is.
    """

    name = "wandb"

    def __init__(self, run: Any, *, owned: bool = False) -> None:
        self._run = run
        self._owned = owned
        self._defined = False
        self._raised: set[tuple[int, str]] = set()
        """Alerts of the newest step with any, by step and rule, that W&B has: a call comes again after it
        failed.
        """

    def values(self, values: StepValues) -> None:
        raised = getattr(self._run, "alert", None)
        if values.alerts and raised is not None:
            self._raised = {key for key in self._raised if key[0] == values.step}
            for alert in values.alerts:
                if (values.step, alert.rule) not in self._raised:
                    text = f"step {alert.step}: {alert.message}"
                    raised(title=f"FP8 {alert.rule}", text=text, level="WARN")
                    self._raised.add((values.step, alert.rule))
        scalars = {**value_scalars(values), **alert_counts(values)}
        if scalars:
            self._log(values.step, scalars)

    def truncate_after(self, step: int) -> None:
        self._raised = {key for key in self._raised if key[0] <= step}

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._owned and metrics:
            self._log(step, metric_names(metrics))

    def close(self) -> None:
        if self._owned:
            self._run.finish()

    def _log(self, step: int, scalars: Mapping[str, float]) -> None:
        if not self._defined:
            self._run.define_metric(STEP)
            for pattern in ("fp8/*", "alerts/*", *(("train/*",) if self._owned else ())):
                self._run.define_metric(pattern, step_metric=STEP)
            self._defined = True
        self._run.log({STEP: step, **scalars}, commit=self._owned)


def own_run(run_dir: Path, metadata: Mapping[str, Any]) -> WandbSink:
    """A new W&B run for this run directory. `WANDB_MODE=offline`, `WANDB_PROJECT` and W&B's other variables
    hold. A resumed job has a W&B run of its own, in the group of the run directory's name, because W&B cannot
    take back what was logged after the step it resumes from.

    Raises:
        ConfigError: the package `wandb` is missing.
    """
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            f"telemetry.sinks has wandb, and the package cannot be imported: {error}.",
            key="telemetry.sinks",
            value="wandb",
            hint="pip install wandb, or take wandb out of telemetry.sinks.",
        ) from error
    run_dir.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "nemo-fp8-recipes"),
        group=run_dir.resolve().name,
        dir=str(run_dir),
        config=dict(metadata),
    )
    return WandbSink(run, owned=True)
