"""`framework=nemo`: the job through NeMo 2's `nl.Trainer`.

parts.py        the job's model, data, optimizer and schedule as NeMo's classes
bookkeeping.py  metrics, checkpoints, signals: what the reference loop does around its steps
session.py      the run directory and the order of things
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_fp8_recipes.training.invocation import Invocation
    from nemo_fp8_recipes.training.settings import Settings

__all__ = ["run_session"]


def run_session(settings: Settings, invocation: Invocation) -> int:
    """Train; returns the exit status: 0, or 128 + the signal that stopped the job."""
    from nemo_fp8_recipes.training.frameworks.nemo import session

    return session.run_session(settings, invocation)
