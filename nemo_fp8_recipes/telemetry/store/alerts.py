"""`telemetry/alerts.jsonl`: the alerts of a run, one a line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from nemo_fp8_recipes.errors import ReportError
from nemo_fp8_recipes.telemetry.alerts.alert import Alert
from nemo_fp8_recipes.telemetry.store.files import DIRECTORY
from nemo_fp8_recipes.telemetry.store.lines import append_lines, read_lines, truncate_lines

__all__ = ["AlertLog", "read_alerts"]


class AlertLog:
    """Appends to the alerts of a run."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / DIRECTORY / "alerts.jsonl"

    def append(self, alerts: Sequence[Alert]) -> None:
        """All of them or, with an OSError, none."""
        append_lines(self._path, [alert.to_dict() for alert in alerts])

    def truncate_after(self, step: int) -> None:
        truncate_lines(self._path, step)


def read_alerts(run_dir: str | Path) -> list[Alert]:
    """The alerts of a run in the order of their steps; empty where there were none.

    Raises:
        ReportError: the file is damaged.
    """
    path = Path(run_dir) / DIRECTORY / "alerts.jsonl"
    try:
        return [Alert.from_dict(row) for row in read_lines(path)]
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ReportError(
            f"{path} is damaged: {error!r}.",
            value=str(path),
            hint="Move it away to read the rest of the run.",
        ) from error
