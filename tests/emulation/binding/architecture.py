"""Compute capabilities that decide layouts."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BLACKWELL", "HOPPER", "Architecture"]

HOPPER, BLACKWELL = (9, 0), (10, 0)


@dataclass(frozen=True)
class Architecture:
    """The least that the binding asks of a device."""

    compute_capability: tuple[int, int]
