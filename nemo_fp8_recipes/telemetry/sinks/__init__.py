"""Where the values go. `SINKS` of the schema names them; each is one file here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.telemetry.schema import SINKS
from nemo_fp8_recipes.telemetry.sinks.base import Sink
from nemo_fp8_recipes.telemetry.sinks.guard import GuardedSink

__all__ = ["GuardedSink", "Sink", "build"]


def build(names: Iterable[str], run_dir: Path, metadata: Mapping[str, Any]) -> list[Sink]:
    """The sinks called `names`, writing below `run_dir`.

    Raises:
        ConfigError: no such sink.
    """
    sinks: list[Sink] = []
    for name in names:
        if name == "parquet":
            from nemo_fp8_recipes.telemetry.sinks.parquet import ParquetSink

            sinks.append(ParquetSink(run_dir, metadata))
        elif name == "tensorboard":
            from nemo_fp8_recipes.telemetry.sinks.tensorboard import TensorBoardSink

            sinks.append(TensorBoardSink(run_dir / "tensorboard"))
        elif name == "jsonl":
            from nemo_fp8_recipes.telemetry.sinks.jsonl import JsonLinesSink

            sinks.append(JsonLinesSink(run_dir / "telemetry" / "values.jsonl"))
        else:
            raise ConfigError(
                f"telemetry.sinks has no sink '{name}'.", key="telemetry.sinks", value=name, allowed=SINKS
            )
    return sinks
