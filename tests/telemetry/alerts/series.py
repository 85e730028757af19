"""Series made by hand: the values of one or two operands over the logging steps, and what the rules say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nemo_fp8_recipes import typed
from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.telemetry.alerts.alert import Alert
from nemo_fp8_recipes.telemetry.alerts.schema import AlertsConfig, default_alerts
from nemo_fp8_recipes.telemetry.alerts.watch import Watch
from nemo_fp8_recipes.telemetry.series import Series, StepValues

MODULE = "decoder.layers.3.mlp.linear_fc1"


def config(**changes: Any) -> AlertsConfig:
    """The default rules with changes, as YAML would make them: `saturation={"limit": 2}`."""
    return typed.read(AlertsConfig, changes, key="alerts", error=ConfigError, base=default_alerts())


def only(rule: str, **changes: Any) -> AlertsConfig:
    """One rule, all others off."""
    names = [name for name in default_alerts().rules() if name != rule]
    return config(**{name: {"enabled": False} for name in names}, **changes)


def steps(
    stats: Mapping[str, Sequence[float]],
    *,
    recipe: str = "delayed",
    tensor: str = "input",
    fmt: str = "e4m3",
    windows: Sequence[Sequence[float]] = (),
    modules: Sequence[str] = (MODULE,),
) -> list[StepValues]:
    """Logging steps 10, 20, …: `stats[name][i]` in the i-th, the same for every module."""
    made = []
    for index in range(len(next(iter(stats.values())))):
        names = tuple(Series(m, tensor, stat, recipe, fmt) for m in modules for stat in stats)
        values = np.float32([stats[stat][index] for _ in modules for stat in stats])
        window = {}
        if windows:
            window = {
                Series(m, tensor, "amax_history", recipe, fmt): np.float32(windows[index]) for m in modules
            }
        made.append(StepValues(10 * (index + 1), names, values, window))
    return made


def alerts(given: Sequence[StepValues], rules: AlertsConfig, *, amax_reduced: bool = True) -> list[Alert]:
    watch = Watch(rules, amax_reduced=amax_reduced)
    return [alert for values in given for alert in watch.look(values)]
