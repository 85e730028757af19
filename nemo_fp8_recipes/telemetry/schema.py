"""The typed shape of the groups `telemetry` and `alerts`. Imports no torch.

`conf/telemetry/*.yaml` gives the values, this dataclass the types and the limits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nemo_fp8_recipes.errors import ConfigError, nearest
from nemo_fp8_recipes.telemetry.alerts.schema import AlertsConfig

__all__ = ["GROUPS", "SINKS", "TelemetryConfig"]

SINKS = ("parquet", "tensorboard", "jsonl", "wandb", "megatron")


@dataclass
class TelemetryConfig:
    """What is logged about the quantised tensors, how often, and where to."""

    name: str = "default"
    enabled: bool = True
    """False: nothing is observed and no training metric goes to TensorBoard."""
    log_every: int = 10
    """Optimizer steps between two logging steps; step 1 is always one."""
    stats_every: int = 100
    """Optimizer steps between two logging steps that read the tensors too; step 1 is one. 0: none do."""
    whatif: list[str] = field(default_factory=list)
    """Globs over `<module>/<tensor>`: judged under every other recipe too, each `stats_every` steps."""
    sinks: list[str] = field(default_factory=lambda: ["parquet", "tensorboard"])
    """Any of `SINKS`. The report reads parquet."""
    history: bool = True
    """Delayed scaling: store the amax history window as well as amax and scale."""
    flush_every: int = 10
    """Logging steps held in memory before they are written; a killed job loses at most these."""

    def __post_init__(self) -> None:
        for key, least in (("log_every", 1), ("flush_every", 1), ("stats_every", 0)):
            if getattr(self, key) < least:
                raise ConfigError(
                    f"telemetry.{key}={getattr(self, key)} is out of range.",
                    key=f"telemetry.{key}",
                    value=getattr(self, key),
                    allowed=[f">= {least}"],
                )
        if self.whatif and not self.stats_every:
            raise ConfigError(
                "telemetry.whatif chooses tensors to read, and telemetry.stats_every=0 reads none.",
                key="telemetry.stats_every",
                value=0,
                allowed=[">= 1"],
            )
        for sink in self.sinks:
            if sink not in SINKS:
                close = nearest(sink, SINKS)
                raise ConfigError(
                    f"telemetry.sinks has no sink '{sink}'.",
                    key="telemetry.sinks",
                    value=sink,
                    allowed=SINKS,
                    hint=f"Did you mean '{close}'?" if close else None,
                )


GROUPS: dict[str, type[Any]] = {"telemetry": TelemetryConfig, "alerts": AlertsConfig}
