"""`nemo-fp8 manifest`: what every module of a run did, and what differs between two."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_fp8_recipes.commands.arguments import take_flags
from nemo_fp8_recipes.errors import ConfigError, ReportError
from nemo_fp8_recipes.training.run_directory import MANIFEST_FILE, MANIFESTS

if TYPE_CHECKING:
    from rich.console import Console

    from nemo_fp8_recipes.injection.rows import Difference, Manifest

__all__ = ["HELP", "run"]

HELP = """
usage: nemo-fp8 manifest [--json] RUN [OTHER]

Show what every quantisable module of a run was found doing, read back from the built model after its first
step and after every change of the recipe; or, of two, what differs from the first to the second.

  RUN, OTHER   run directories, or single manifests: RUN/manifest.json, RUN/manifests/step_00000101.json
  --json       one JSON document: the manifest (docs/schemas/manifest.md), or of two {"schema_version": 1,
               "before": ..., "after": ..., "differences": [{module, field, before, after}, ...]}

The exit status is 1 when two manifests differ, 0 when they do not, 2 for an error.

example:
  nemo-fp8 manifest runs/mxfp8-20260101-120000
  nemo-fp8 manifest runs/mxfp8-20260101-120000 runs/blockwise-20260102-120000
"""

DIFFERENT = 1


def run(arguments: list[str]) -> int:
    flags, paths = take_flags(arguments, ["--json"])
    if len(paths) not in (1, 2):
        raise ConfigError(
            f"nemo-fp8 manifest takes one or two runs, {len(paths)} were given.",
            value=" ".join(paths),
            hint="Example: nemo-fp8 manifest runs/mxfp8-20260101-120000",
        )
    found = [_read(Path(path)) for path in paths]
    if len(found) == 1:
        return _show(Path(paths[0]), found[0], as_json="--json" in flags)
    differences = found[0].diff(found[1])
    if "--json" in flags:
        print(json.dumps(_document(paths, differences), indent=1, allow_nan=False))
    else:
        _print_differences(paths, found, differences)
    return DIFFERENT if differences else 0


def _show(path: Path, manifest: Manifest, *, as_json: bool) -> int:
    if as_json:
        print(manifest.to_json())
        return 0
    from nemo_fp8_recipes.terminal import Terminal

    console = Terminal(highlight=False)
    console.print(manifest.table())
    _print_changes(path, console)
    return 0


def _print_changes(path: Path, console: Console) -> None:
    """What changed from one recipe of the run to the next, where it had several."""
    steps = sorted((path / MANIFESTS).glob("step_*.json")) if path.is_dir() else []
    manifests = [_read(step) for step in steps]
    for before, after, step in zip(manifests, manifests[1:], steps[1:], strict=False):
        from nemo_fp8_recipes.injection.diff_table import render

        number = int(step.stem.removeprefix("step_"))
        console.print(f"\n[bold]Changed in step {number}[/bold]")
        differences = before.diff(after)
        console.print(render(differences) if differences else "nothing")


def _print_differences(paths: list[str], found: list[Manifest], differences: tuple[Difference, ...]) -> None:
    from nemo_fp8_recipes.injection.diff_table import render
    from nemo_fp8_recipes.terminal import Terminal

    console = Terminal(highlight=False)
    for name, path, manifest in zip(("before", "after"), paths, found, strict=True):
        quantized = f"{len(manifest.quantized())} of {len(manifest.rows)} modules quantised"
        recipe = f", asked for {manifest.asked}" if manifest.asked else ""
        console.print(f"{name:<7} {path}: {quantized}{recipe}", markup=False)
    console.print()
    console.print(render(differences) if differences else "No module differs.")


def _document(paths: list[str], differences: tuple[Difference, ...]) -> dict[str, Any]:
    def plain(value: object) -> object:
        return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]  # an instance, never a class

    return {
        "schema_version": 1,
        "before": paths[0],
        "after": paths[1],
        "differences": [
            {
                "module": one.module,
                "field": one.field,
                "before": plain(one.before),
                "after": plain(one.after),
            }
            for one in differences
        ],
    }


def _read(path: Path) -> Manifest:
    """The manifest in a file, or the last one of a run directory.

    Raises:
        ReportError: there is none, or it is damaged or of another version.
    """
    from nemo_fp8_recipes.injection.rows import Manifest

    file = path / MANIFEST_FILE if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        if path.is_dir():
            raise ReportError(
                f"{path} has no {MANIFEST_FILE}.",
                value=str(path),
                hint="A run writes it after its first step; give the run directory that `nemo-fp8 train` "
                "printed.",
            ) from error
        raise ReportError(
            f"There is no {path}.", value=str(path), hint="nemo-fp8 runs lists the runs that there are."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{file} cannot be read: {error}.", value=str(file)) from error
    try:
        return Manifest.from_json(text)
    except ReportError as error:
        raise ReportError(f"{file}: {error.message}", value=str(file), hint=error.hint) from error
