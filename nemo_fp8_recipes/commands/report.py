"""`nemo-fp8 report`: what a finished or running run logged."""

from __future__ import annotations

import json
from pathlib import Path

from nemo_fp8_recipes.errors import ConfigError, nearest

__all__ = ["HELP", "run"]

HELP = """
usage: nemo-fp8 report [--text | --json | --html[=FILE]] [--all-layers] RUN [RUN ...]

Show what a run logged: the loss curve, and for each tensor of each layer its amax, scale and headroom.
Works while the run is going on.

  RUN           run directory, as printed by nemo-fp8 train; --html takes several, to compare them
  --text        print to the terminal (the default)
  --json        print one JSON document; of each amax history window the newest 32 entries
  --html        write one HTML file that needs no network; FILE is RUN/report.html where it is not given
  --all-layers  a row for every layer, however many there are

examples:
  nemo-fp8 report runs/mxfp8-20260101-120000
  nemo-fp8 report --html=compared.html runs/bf16-20260101-110000 runs/mxfp8-20260101-120000
"""

_FLAGS = ("--text", "--json", "--html", "--all-layers")
_FORMS = ("--text", "--json", "--html")


def run(arguments: list[str]) -> int:
    given = dict(argument.partition("=")[::2] for argument in arguments if argument.startswith("-"))
    flags = list(given)
    for flag, value in given.items():
        if value and flag in _FLAGS and flag != "--html":
            raise ConfigError(f"nemo-fp8 report's {flag} takes no value.", key=flag, value=value)
        if flag not in _FLAGS:
            close = nearest(flag, _FLAGS)
            raise ConfigError(
                f"nemo-fp8 report has no option {flag}.",
                key=flag,
                allowed=_FLAGS,
                hint=f"Did you mean {close}?" if close else None,
            )
    forms = [form for form in _FORMS if form in given]
    if len(forms) > 1:
        raise ConfigError(f"Give {forms[0]} or {forms[1]}, not both.", key=forms[1])
    paths = [argument for argument in arguments if not argument.startswith("-")]
    if forms == ["--html"] and paths:
        from nemo_fp8_recipes.report import html

        out = Path(given["--html"] or Path(paths[0]) / "report.html")
        html.write(paths, out)
        print(out)
        return 0
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
    from nemo_fp8_recipes.report import text
    from nemo_fp8_recipes.terminal import Terminal

    text.render(paths[0], Terminal(highlight=False), all_layers="--all-layers" in flags)
    return 0
