"""The values of a step as named scalars, for the sinks that show curves."""

from __future__ import annotations

from collections.abc import Mapping

from nemo_fp8_recipes.telemetry.series import StepValues

__all__ = ["alert_counts", "metric_names", "value_scalars"]

_NAMES = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "step_time_ms": "train/step_time_ms",
}


def value_scalars(values: StepValues) -> dict[str, float]:
    """`fp8/<module>/<tensor>/<stat>` -> number. Windows are left out."""
    return dict(zip((series.tag for series in values.series), values.values.tolist(), strict=True))


def alert_counts(values: StepValues) -> dict[str, float]:
    """`alerts/<rule>` -> tensors that began to violate it in this step."""
    return {f"alerts/{alert.rule}": float(len(alert.tensors)) for alert in values.alerts}


def metric_names(metrics: Mapping[str, float]) -> dict[str, float]:
    """Training metrics under the names that curves have: `train/<metric>`."""
    return {_NAMES.get(name, f"train/{name}"): float(value) for name, value in metrics.items()}
