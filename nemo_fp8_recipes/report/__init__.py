"""What a run directory shows: loss curve, and what the recipe did to each tensor. No torch."""

from __future__ import annotations
