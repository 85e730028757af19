"""`nemo-fp8 doctor`: what would fail, before the job starts."""

from __future__ import annotations

import json
import os

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nemo_fp8_recipes import config, emulation, preflight, recipes
from nemo_fp8_recipes.commands.arguments import take_flags
from nemo_fp8_recipes.errors import EmulationError
from nemo_fp8_recipes.preflight import Finding

__all__ = ["HELP", "run"]

HELP = """
usage: nemo-fp8 doctor [group=choice] [group.key=value] ... [--json] [--strict]

Check recipe, GPU, shapes, versions and environment of a job without starting it: no GPU and no torch needed.
Findings come worst first, each with its code, what to do and where the rule comes from.

  --json     one JSON object: {"schema_version": 1, "recipe": ..., "findings": [...]}
  --strict   warnings count as errors

exit status: 0 nothing would fail, 1 something would, 2 the configuration itself is wrong

examples:
  nemo-fp8 doctor fp8_recipe=mxfp8 hardware=h100
  nemo-fp8 doctor fp8_recipe=blockwise model=nemotron3_8b hardware=h200 device=native parallel.tp=8
"""

_STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}


def run(arguments: list[str]) -> int:
    """Check the job that `arguments` describe; 0 when it would run, 1 when it would not."""
    flags, overrides = take_flags(arguments, {"--json", "--strict"})
    composed = config.compose(overrides)
    emulated, runs_here = _where(str(composed.device))
    findings = preflight.check_job(composed, emulated=emulated, runs_here=runs_here)
    recipe = recipes.load(composed.fp8_recipe)
    if "--json" in flags:
        print(
            json.dumps(
                {
                    "schema_version": 1,
                    "recipe": recipe.to_dict(),
                    "hardware": str(composed.hardware.name),
                    "emulated": emulated,
                    "findings": [finding.to_dict() for finding in findings],
                },
                indent=2,
            )
        )
    else:
        console = Console()
        for note in config.alias_notes(overrides):
            console.print(note, soft_wrap=True, markup=False)
        where = "emulated" if emulated else "on a GPU"
        console.print(
            f"fp8_recipe={recipe.name} model={composed.model.name} hardware={composed.hardware.name} "
            f"({where})",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        _print(console, findings)
    stopping = {"error", "warning"} if "--strict" in flags else {"error"}
    return 1 if any(finding.severity in stopping for finding in findings) else 0


def _where(device: str) -> tuple[bool, bool]:
    """Whether the job is emulated, and whether it runs on this machine.

    A job with device=native is checked on machines that have no GPU too: for the machine it will run on.
    """
    try:
        return emulation.should_start(device, os.environ), True
    except EmulationError:
        if device != "native":
            raise
        return False, False


def _print(console: Console, findings: list[Finding]) -> None:
    if not findings:
        console.print("[green]Nothing found that would fail.[/green]")
        return
    table = Table(box=None, show_header=False, padding=(0, 2, 1, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        body = Text(finding.message)
        if finding.fix:
            body.append(f"\n{finding.fix}", style="bold")
        body.append(f"\n{finding.source}", style="dim")
        if finding.versions:
            body.append(f" ({finding.versions})", style="dim")
        table.add_row(Text(finding.severity, style=_STYLES[finding.severity]), finding.code, body)
    console.print(table)
    counts = ", ".join(
        f"{count} {severity}{'s' if count != 1 and severity != 'info' else ''}"
        for severity in preflight.SEVERITIES
        if (count := sum(finding.severity == severity for finding in findings))
    )
    console.print(f"{counts}.", highlight=False)
