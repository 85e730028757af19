"""Which complete checkpoint a run directory would go on from. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["newest_complete_step"]

_NAME = re.compile(r"step_(\d{6,})")
_MARKER = "complete.json"  # the training job writes it last


def newest_complete_step(run_dir: Path) -> int | None:
    """The step of the newest complete checkpoint in `run_dir`, or None."""
    steps = (
        int(match.group(1))
        for marker in (run_dir / "checkpoints").glob(f"step_*/{_MARKER}")
        if (match := _NAME.fullmatch(marker.parent.name))
    )
    return max(steps, default=None)
