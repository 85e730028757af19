"""`nemo-fp8 report`: what a finished or running run logged."""

from __future__ import annotations

import json

from nemo_fp8_recipes.errors import ConfigError, nearest

__all__ = ["HELP", "run"]

HELP = """
usage: nemo-fp8 report [--text | --json] [--all-layers] RUN

Show what a run logged: the loss curve, and for each tensor of each layer its amax, scale and headroom.
Works while the run is going on.

  RUN           run directory, as printed by nemo-fp8 train
  --text        print to the terminal (the default)
  --json        print one JSON document
  --all-layers  a row for every layer, however many there are

example:
  nemo-fp8 report runs/mxfp8-20260101-120000
"""

_FLAGS = ("--text", "--json", "--all-layers")


def run(arguments: list[str]) -> int:
    flags = [argument for argument in arguments if argument.startswith("-")]
    for flag in flags:
        if flag not in _FLAGS:
            close = nearest(flag, _FLAGS)
            raise ConfigError(
                f"nemo-fp8 report has no option {flag}.",
                key=flag,
                allowed=_FLAGS,
                hint=f"Did you mean {close}?" if close else None,
            )
    if "--text" in flags and "--json" in flags:
        raise ConfigError("Give --text or --json, not both.", key="--json")
    paths = [argument for argument in arguments if not argument.startswith("-")]
    if len(paths) != 1:
        raise ConfigError(
            f"nemo-fp8 report takes one run directory, {len(paths)} were given.",
            value=" ".join(paths),
            hint="Example: nemo-fp8 report runs/mxfp8-20260101-120000",
        )
    if "--json" in flags:
        from nemo_fp8_recipes.report.document import document

        print(json.dumps(document(paths[0]), indent=1, allow_nan=False))
        return 0
    from rich.console import Console

    from nemo_fp8_recipes.report import text

    text.render(paths[0], Console(highlight=False), all_layers="--all-layers" in flags)
    return 0
