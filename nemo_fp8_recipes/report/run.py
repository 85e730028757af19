"""Reading a run directory, finished or still growing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_fp8_recipes.errors import ReportError, RunDirectoryError
from nemo_fp8_recipes.injection.rows import Manifest
from nemo_fp8_recipes.launch.runs.state import read_run_state
from nemo_fp8_recipes.telemetry import store
from nemo_fp8_recipes.telemetry.alerts.alert import Alert
from nemo_fp8_recipes.training.metrics import read_metrics
from nemo_fp8_recipes.training.run_directory import MANIFESTS, METRICS_FILE, read_run

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Run", "load"]


@dataclass(frozen=True)
class Run:
    """What a run left behind so far.

    Attributes:
        path: the run directory.
        record: `run.json`; the status "running" that a killed job left there is "interrupted" here.
        metrics: rows of `metrics.jsonl`, ascending by step; a number that was not finite is None.
        manifest: what each module did, None before the first step has ended.
        telemetry: rows of the telemetry store.
        alerts: what the alert rules reported, ascending by step.
        manifests: under a recipe schedule, what each module did from a step on, ascending by step; empty
            otherwise.
    """

    path: Path
    record: Mapping[str, Any]
    metrics: tuple[Mapping[str, Any], ...]
    manifest: Manifest | None
    telemetry: pa.Table
    alerts: tuple[Alert, ...] = ()
    manifests: tuple[tuple[int, Manifest], ...] = ()

    @property
    def recipe(self) -> str:
        """Canonical name of the recipe that was asked for."""
        return str(self.record.get("recipe", {}).get("name", "unknown"))

    @property
    def losses(self) -> list[tuple[int, float]]:
        """(step, loss) of every logged step with a finite loss."""
        return [(row["step"], row["loss"]) for row in self.metrics if row.get("loss") is not None]


def load(path: str | Path) -> Run:
    """Read a run directory.

    Raises:
        ReportError: not a run directory, a damaged file, or a schema this installation is too old for. The
            message names the file.
    """
    path = Path(path)
    if not path.is_dir():
        raise ReportError(
            f"{path} is not a directory." if path.exists() else f"There is no directory {path}.",
            value=str(path),
            hint="Give the run directory that `nemo-fp8 train` printed.",
        )
    try:
        record = read_run(path)
        metrics = read_metrics(path / METRICS_FILE)
    except RunDirectoryError as error:
        raise ReportError(error.message, value=str(path), allowed=error.allowed, hint=error.hint) from error
    return Run(
        path,
        _as_it_stands(path, record),
        tuple(metrics),
        _manifest(path / "manifest.json"),
        store.read(path, stat=None),
        tuple(store.read_alerts(path)),
        _manifests(path / MANIFESTS),
    )


def _as_it_stands(path: Path, record: Mapping[str, Any]) -> Mapping[str, Any]:
    if record.get("status") != "running":
        return record
    found = read_run_state(path)
    if found.state in ("running", "unreadable"):
        return record
    return {**record, "status": found.state, "error": found.reason}


def _manifests(directory: Path) -> tuple[tuple[int, Manifest], ...]:
    """Those of a run whose recipe changes; one that says the same as the one before it, which a resumed run
    writes, is left out.
    """
    found: list[tuple[int, Manifest]] = []
    for path in sorted(directory.glob("step_*.json")):
        number = path.stem.removeprefix("step_")
        manifest = _manifest(path) if number.isdigit() else None
        if manifest is not None and (not found or found[-1][1] != manifest):
            found.append((int(number), manifest))
    return tuple(found)


def _manifest(path: Path) -> Manifest | None:
    if not path.exists():
        return None
    try:
        return Manifest.from_json(path.read_text(encoding="utf-8"))
    except ReportError as error:
        raise ReportError(f"{path}: {error.message}", value=str(path), hint=error.hint) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{path} cannot be read: {error}.", value=str(path)) from error
