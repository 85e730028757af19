"""`nemo-fp8 runs`: the run directories and the state they are in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_fp8_recipes.errors import ConfigError, RunDirectoryError, nearest
from nemo_fp8_recipes.launch.plan import RUNS
from nemo_fp8_recipes.launch.runs.state import Run, find_runs, read_run_state

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["HELP", "run"]

HELP = """
usage: nemo-fp8 runs [--json] [DIRECTORY ...]

List run directories: state, recipe, last step, last loss, and why a run failed or was interrupted. A run is
"running" only while its process holds the run directory's lock or SLURM says so, whatever was written last.

  DIRECTORY   a run directory, or one that holds some; default: runs
  --json      one JSON document: {"schema_version": 1, "runs": [...]}

example:
  nemo-fp8 runs
  nemo-fp8 runs --json /path/to/runs
"""

_OPTIONS = ("--json",)
_STYLES = {
    "running": "cyan",
    "finished": "green",
    "failed": "red",
    "interrupted": "yellow",
    "unreadable": "red",
}


def run(arguments: list[str]) -> int:
    for argument in arguments:
        if argument.startswith("-") and argument not in _OPTIONS:
            close = nearest(argument, _OPTIONS)
            raise ConfigError(
                f"nemo-fp8 runs has no option {argument}.",
                key=argument,
                allowed=_OPTIONS,
                hint=f"Did you mean {close}?" if close else None,
            )
    given = [Path(argument) for argument in arguments if not argument.startswith("-")]
    for path in given:
        if not path.is_dir():
            raise RunDirectoryError(f"{path} is not a directory.", value=str(path))
    found = [read_run_state(path) for parent in given or [RUNS] for path in find_runs(parent)]
    if "--json" in arguments:
        document = {"schema_version": 1, "runs": [each.to_dict() for each in found]}
        print(json.dumps(document, indent=1, allow_nan=False))
        return 0
    from nemo_fp8_recipes.terminal import Terminal

    console = Terminal(highlight=False)
    if not found:
        where = ", ".join(str(path) for path in given or [RUNS])
        console.print(f"No runs in {where}.", markup=False)
        return 0
    _print(found, console)
    return 0


def _print(found: list[Run], console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("run", "state", "recipe", "step", "loss", ""):
        table.add_column(name, justify="right" if name in ("step", "loss") else "left", overflow="fold")
    for each in found:
        style = _STYLES.get(each.state, "")
        state = f"[{style}]{each.state}[/{style}]" if style else each.state
        table.add_row(
            escape(each.path),
            state,
            each.recipe or "-",
            "-" if each.last_step is None else str(each.last_step),
            _loss(each),
            escape(_remark(each)),
        )
    console.print(table)


def _loss(each: Run) -> str:
    if each.last_step is None:
        return "-"
    return "not finite" if each.last_loss is None else f"{each.last_loss:.4f}"


def _remark(each: Run) -> str:
    parts = [each.reason or ""]
    if each.resumable:
        parts.append(f"resumable after step {each.checkpoint_step}")
    return "; ".join(part for part in parts if part)
