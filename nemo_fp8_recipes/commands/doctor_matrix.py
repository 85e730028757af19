"""`nemo-fp8 doctor --all`: every recipe on every GPU, for one model."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.table import Table

from nemo_fp8_recipes import config, preflight, recipes
from nemo_fp8_recipes.terminal import Terminal

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from nemo_fp8_recipes.preflight import Finding, PreflightInput

__all__ = ["matrix", "show"]

_STYLES = {"error": "red", "warning": "yellow"}


def matrix(job: PreflightInput, ignored: frozenset[str] = frozenset()) -> dict[str, dict[str, list[Finding]]]:
    """Errors and warnings of `job` by recipe and GPU, with every base recipe and preset on every GPU."""
    gpus = [preflight.named_hardware(name) for name in config.options("hardware") if name != "auto"]
    found: dict[str, dict[str, list[Finding]]] = {}
    for name in (*recipes.names(), *recipes.presets()):
        everywhere = preflight.check_on(replace(job, recipe=recipes.load(name)), gpus)
        found[name] = {
            gpu: [finding for finding in here if finding.severity != "info" and finding.code not in ignored]
            for gpu, here in everywhere.items()
        }
    return found


def show(composed: DictConfig, *, emulated: bool, runs_here: bool, as_json: bool) -> int:
    """Print the matrix of a composed configuration; 0, whatever is in it."""
    job = replace(preflight.job_input(composed, os.environ, emulated=emulated), runs_here=runs_here)
    found = matrix(job, frozenset(composed.preflight.ignore))
    if as_json:
        plain = {
            name: {gpu: [finding.code for finding in findings] for gpu, findings in row.items()}
            for name, row in found.items()
        }
        print(json.dumps({"schema_version": 1, "model": str(composed.model.name), "matrix": plain}, indent=2))
        return 0
    console = Terminal()
    cut = ", ".join(f"{key}={composed.parallel[key]}" for key in ("tp", "pp", "cp", "ep", "sequence"))
    console.print(f"model={composed.model.name} with {cut}", highlight=False, markup=False)
    table = Table(box=None, padding=(0, 1))
    table.add_column("fp8_recipe", no_wrap=True)
    gpus = list(next(iter(found.values())))
    for gpu in gpus:
        table.add_column(gpu.replace("_", " "))
    for name, row in found.items():
        table.add_row(name, *(_cell(row[gpu]) for gpu in gpus))
    console.print(table)
    console.print("Each cell names the worst finding; `nemo-fp8 doctor` with that recipe and GPU says more.")
    return 0


def _cell(findings: list[Finding]) -> str:
    if not findings:
        return "[green]ok[/green]"
    worst = preflight.worst_first(findings)[0]
    style = _STYLES[worst.severity]
    return f"[{style}]{worst.code.removeprefix('FP8-')}[/{style}]"
