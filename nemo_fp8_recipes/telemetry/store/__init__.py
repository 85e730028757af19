"""The telemetry store: Parquet files in `<run_dir>/telemetry/`, one for each range of steps. No torch."""

from __future__ import annotations

from nemo_fp8_recipes.telemetry.store.alerts import read_alerts
from nemo_fp8_recipes.telemetry.store.files import DIRECTORY, Part, parts
from nemo_fp8_recipes.telemetry.store.reader import info, read, steps
from nemo_fp8_recipes.telemetry.store.table import SCHEMA, SCHEMA_VERSION
from nemo_fp8_recipes.telemetry.store.writer import StoreWriter

__all__ = [
    "DIRECTORY",
    "SCHEMA",
    "SCHEMA_VERSION",
    "Part",
    "StoreWriter",
    "info",
    "parts",
    "read",
    "read_alerts",
    "steps",
]
