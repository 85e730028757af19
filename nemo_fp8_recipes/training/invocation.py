"""How a job was started and where it runs. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Invocation"]


@dataclass(frozen=True)
class Invocation:
    """How the job was started and where it runs, for its record."""

    command: Sequence[str]
    overrides: Sequence[str]
    config_yaml: str
    versions: Mapping[str, str | None]
    device_label: str
    """"emulated b200", or the name of the GPU."""
    emulated: bool
    notes: Sequence[str] = ()
    """What the user should know before the first step: preflight's warnings, names that were translated."""
