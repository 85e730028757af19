"""The report as one HTML file that works without a network: plotly.js is inside it."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from nemo_fp8_recipes import __version__
from nemo_fp8_recipes.errors import ReportError, RunDirectoryError
from nemo_fp8_recipes.report.html.data import run_data
from nemo_fp8_recipes.report.run import load
from nemo_fp8_recipes.training.files import atomic_write_text

__all__ = ["write"]

# Whatever a run directory holds must not end the script element that it stands in.
_SAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def write(runs: Sequence[str | Path], out: Path) -> None:
    """Write the report of one run, or of several side by side, to `out`. A file that is there is replaced.

    Raises:
        ReportError: plotly is not installed, a run cannot be read (see `run.load`), or `out` cannot be
            written.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ReportError(
            "The HTML report needs plotly, which is not installed.",
            key="--html",
            hint="Install it with pip install 'nemo-fp8-recipes[report]', or use --text.",
        ) from error
    shown = [run_data(load(run)) for run in runs]
    title = "FP8 report: " + ", ".join(run["name"] for run in shown)
    page = resources.files(__package__)
    parts = {
        "title": html.escape(title),
        "style": (page / "page.css").read_text(encoding="utf-8"),
        "data": _json({"version": __version__, "runs": shown}),
        "plotly": get_plotlyjs(),
        "script": (page / "page.js").read_text(encoding="utf-8"),
    }
    text = (page / "page.html").read_text(encoding="utf-8")
    for name, part in parts.items():
        # Not str.format and not Template: scripts are full of braces and dollars.
        before, _, after = text.partition(f"<!-- {name} -->")
        text = before + part + after
    try:
        atomic_write_text(out, text)
    except RunDirectoryError as error:
        raise ReportError(error.message, key="--html", value=str(out)) from error


def _json(data: object) -> str:
    text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    for character, escaped in _SAFE.items():
        text = text.replace(character, escaped)
    return text
