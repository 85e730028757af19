"""Errors of a training job that need their own name. Imports no torch."""

from __future__ import annotations

from nemo_fp8_recipes.errors import Fp8Error

__all__ = ["DivergedError", "OutOfMemoryError", "ReportedElsewhereError"]


class DivergedError(Fp8Error):
    """The loss is no longer a number: the run cannot recover."""


class OutOfMemoryError(Fp8Error):
    """The job does not fit into the memory of its device."""


class ReportedElsewhereError(Fp8Error):
    """An error of another rank, which prints it, that ends this rank too."""
