"""The notice that a batch job's time is nearly up, as a file.

A signal is lost, or ends the process, while srun and Python start: nobody listens yet. The batch script makes
the file that the variable `NOTICE` names instead, and what watches a job's processes looks for it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["NOTICE", "given"]

NOTICE = "NEMO_FP8_NOTICE"


def given(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the job was told to save; never outside of a batch job."""
    named = environ.get(NOTICE)
    return bool(named) and Path(str(named)).exists()
