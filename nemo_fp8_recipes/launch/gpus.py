"""The GPUs of this machine as NVIDIA's own tool lists them. Imports no torch."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

from nemo_fp8_recipes.errors import PreflightError

__all__ = ["Gpu", "found"]

_QUERY = ("--query-gpu=name,compute_cap", "--format=csv,noheader")
_SECONDS = 60  # a GPU that does not answer for so long is broken


@dataclass(frozen=True)
class Gpu:
    """One GPU: product name and compute capability."""

    name: str
    compute_capability: tuple[int, int]


def found() -> list[Gpu]:
    """The GPUs of this machine; none where nvidia-smi is not installed.

    Raises:
        PreflightError: nvidia-smi is there and fails, hangs, or answers something else than GPUs.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        done = subprocess.run([tool, *_QUERY], capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise PreflightError(
            f"nvidia-smi gave no answer in {_SECONDS} s.", hint="The GPU or its driver hangs."
        ) from None
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise PreflightError(
            f"nvidia-smi fails on this machine: {said[0] if said else f'exit status {done.returncode}'}.",
            hint="The GPU's driver does not work here.",
        )
    return [_read(line) for line in done.stdout.splitlines() if line.strip()]


def _read(line: str) -> Gpu:
    name, _, capability = (part.strip() for part in line.rpartition(","))
    try:
        major, minor = (int(part) for part in capability.split("."))
    except ValueError:
        raise PreflightError(f"nvidia-smi lists a GPU that cannot be read: {line!r}.") from None
    return Gpu(name, (major, minor))
