"""`nemo-fp8 doctor`: what would fail, before the job starts."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from nemo_fp8_recipes import config, emulation, preflight, recipes
from nemo_fp8_recipes.commands import doctor_matrix
from nemo_fp8_recipes.commands.arguments import take_flags
from nemo_fp8_recipes.preflight import Finding
from nemo_fp8_recipes.recipes.modules import module_recipes_of
from nemo_fp8_recipes.recipes.schedule import schedule_of
from nemo_fp8_recipes.terminal import Terminal
from nemo_fp8_recipes.training.frameworks import FRAMEWORKS
from nemo_fp8_recipes.training.settings import read_settings

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["HELP", "run"]

HELP = """
usage: nemo-fp8 doctor [group=choice] [group.key=value] ... [--all] [--json] [--strict]

Check recipe, GPU, shapes, versions and environment of a job without starting it: no GPU and no torch needed.
Findings come worst first, each with its code, what to do and where the rule comes from; then what the recipe
costs in memory, and how much of the work it quantises.

  --all      every recipe on every GPU for this model: a table of the worst that was found
  --json     one JSON object: {"schema_version": 1, "recipe": ..., "findings": [...], "cost": ...}
  --strict   warnings count: exit status 1

versions.te=2.4 checks for another Transformer Engine than the installed one.

exit status: 0 nothing would fail, 1 warnings with --strict, 2 something would fail, or the configuration is
wrong

examples:
  nemo-fp8 doctor fp8_recipe=mxfp8 hardware=h100
  nemo-fp8 doctor fp8_recipe=blockwise model=nemotron3_8b hardware=h200 device=native parallel.tp=8
  nemo-fp8 doctor model=nemotron_h_8b parallel=published device=native --all
"""

_STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}


def run(arguments: list[str]) -> int:
    """Check the job that `arguments` describe: 0 it would run, 1 warnings with --strict, 2 it would fail."""
    flags, overrides = take_flags(arguments, {"--all", "--json", "--strict"})
    composed = config.compose(overrides)
    FRAMEWORKS[str(composed.framework.name)].require_one_recipe(read_settings(composed))
    emulated, runs_here = _where(str(composed.device))
    if "--all" in flags:
        return doctor_matrix.show(composed, emulated=emulated, runs_here=runs_here, as_json="--json" in flags)
    findings = preflight.check_job(composed, emulated=emulated, runs_here=runs_here)
    recipe = recipes.load(composed.fp8_recipe)
    job = preflight.job_input(composed, os.environ, emulated=emulated)
    assert job.model is not None
    modules = module_recipes_of(composed, schedule_of(composed))
    spent = preflight.cost(recipe, job.hardware.capability, job.model, job.parallel, modules)
    if "--json" in flags:
        print(
            json.dumps(
                {
                    "schema_version": 1,
                    "recipe": recipe.to_dict(),
                    "hardware": str(composed.hardware.name),
                    "emulated": emulated,
                    "findings": [finding.to_dict() for finding in findings],
                    "cost": spent.to_dict(),
                },
                indent=2,
            )
        )
    else:
        console = Terminal()
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
        baseline = preflight.cost(recipes.load("bf16"), job.hardware.capability, job.model, job.parallel)
        _print_cost(console, recipe.name, spent, baseline)
    if any(finding.severity == "error" for finding in findings):
        return 2
    return 1 if "--strict" in flags and any(finding.severity == "warning" for finding in findings) else 0


def _print_cost(console: Console, name: str, spent: preflight.Cost, baseline: preflight.Cost) -> None:
    """Memory of the linear layers beside BF16's, and the share of the work that is quantised."""
    said = (
        f"Linear layers of one rank: weights {_bytes(spent.weights)}, "
        f"saved inputs {_bytes(spent.saved_inputs)} a micro-batch; "
        f"{spent.quantised_share:.0%} of the GEMM work is quantised."
    )
    if name != "bf16":
        held = f"{_bytes(baseline.weights)} and {_bytes(baseline.saved_inputs)}"
        said += f" BF16 holds {held}: {name} needs {'more' if spent.held > baseline.held else 'less'}."
    console.print(said, highlight=False, markup=False, soft_wrap=True)


def _bytes(count: int) -> str:
    """In GB where it is one, else in MB; powers of ten."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _where(device: str) -> tuple[bool, bool]:
    """Whether the job is emulated, and whether it runs on this machine.

    A job with device=native is checked on machines that have no GPU too: for the machine it will run on. The
    driver says whether there is a GPU: torch is not imported for that.
    """
    if device == "native":
        return False, preflight.hardware_here() is not None
    if device == "auto" and preflight.hardware_here() is not None:
        return False, True
    return device == "emulated" or emulation.should_start(device, os.environ), True


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
