"""`telemetry/alerts.jsonl`: the alerts of a run, one a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
        ReportError: the file cannot be read or is damaged.
    """
    path = Path(run_dir) / DIRECTORY / "alerts.jsonl"
    try:
        rows = read_lines(path)
    except OSError as error:
        raise ReportError(f"Cannot read {path}: {error.strerror or error}.", value=str(path)) from error
    except ValueError as error:
        raise _damaged(path, "a line of it is no JSON") from error
    return [_alert(path, number, row) for number, row in enumerate(rows, start=1)]


def _alert(path: Path, number: int, row: Mapping[str, Any]) -> Alert:
    try:
        return Alert.from_dict(row)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"line {number} is no alert") from error


def _damaged(path: Path, how: str) -> ReportError:
    return ReportError(
        f"{path} is damaged: {how}.", value=str(path), hint="Move it away to read the rest of the run."
    )
