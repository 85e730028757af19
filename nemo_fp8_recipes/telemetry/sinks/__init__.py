"""Where the values go. `SINKS` of the schema names those that a name makes; each is one file here.

A sink may also be an object that the training job has already: `adopt` knows which.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nemo_fp8_recipes.dependencies import explained
from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.telemetry.schema import SINKS
from nemo_fp8_recipes.telemetry.sinks.base import Sink
from nemo_fp8_recipes.telemetry.sinks.guard import GuardedSink

__all__ = ["GuardedSink", "Sink", "adopt", "build"]


def build(sinks: Iterable[Any], run_dir: Path, metadata: Mapping[str, Any]) -> list[Sink]:
    """The sinks of these names, writing below `run_dir`, and of these objects.

    Raises:
        ConfigError: no such sink, or an object that is none.
        DependencyError: the library that a sink writes with is not installed.
    """
    with explained():
        return [
            _make(sink, run_dir, metadata) if isinstance(sink, str) and sink in SINKS else adopt(sink)
            for sink in sinks
        ]


def adopt(given: Any) -> Sink:
    """The sink that writes to what the training job has: a `Sink` itself, a Lightning logger, a
    SummaryWriter of torch or tensorboardX, a W&B run or the `wandb` module.

    Raises:
        ConfigError: it is none of these.
    """
    if isinstance(given, Sink):
        return given
    if callable(getattr(given, "log_metrics", None)):
        from nemo_fp8_recipes.telemetry.sinks.lightning import LightningSink

        return LightningSink(given)
    if callable(getattr(getattr(given, "file_writer", None), "add_summary", None)):
        from nemo_fp8_recipes.telemetry.sinks.tensorboard import SummaryWriterSink

        return SummaryWriterSink(given)
    if callable(getattr(given, "log", None)) and callable(getattr(given, "define_metric", None)):
        from nemo_fp8_recipes.telemetry.sinks.wandb import WandbSink

        return WandbSink(given)
    named = isinstance(given, str)
    raise ConfigError(
        f"telemetry.sinks has no sink '{given}'." if named else f"{type(given).__name__} is no sink.",
        key="telemetry.sinks",
        value=given if named else type(given).__name__,
        allowed=SINKS if named else ["a Sink", "a Lightning logger", "a SummaryWriter", "a W&B run"],
    )


def _make(name: str, run_dir: Path, metadata: Mapping[str, Any]) -> Sink:
    """The sink of a name in `SINKS`. Its library is imported here and not before."""
    if name == "parquet":
        from nemo_fp8_recipes.telemetry.sinks.parquet import ParquetSink

        return ParquetSink(run_dir, metadata)
    if name == "tensorboard":
        from nemo_fp8_recipes.telemetry.sinks.tensorboard import TensorBoardSink

        return TensorBoardSink(run_dir / "tensorboard")
    if name == "jsonl":
        from nemo_fp8_recipes.telemetry.sinks.jsonl import JsonLinesSink

        return JsonLinesSink(run_dir / "telemetry" / "values.jsonl")
    if name == "wandb":
        from nemo_fp8_recipes.telemetry.sinks.wandb import own_run

        return own_run(run_dir, metadata)
    from nemo_fp8_recipes.telemetry.sinks.megatron import MegatronSink

    return MegatronSink()
