"""Errors a user can act on.

Every failure that has a configuration reason is an `Fp8Error`: one sentence that names the key, the value,
what is allowed and what to do. The command line prints it without a traceback (`--debug` shows that too).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DependencyError",
    "EmulationError",
    "Fp8Error",
    "InjectionError",
    "PreflightError",
    "RecipeError",
    "ReportError",
    "RunDirectoryError",
    "nearest",
]


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice spelled most like `word`, or None when nothing comes close."""
    matches = difflib.get_close_matches(
        str(word).lower(), [str(choice) for choice in choices], n=1, cutoff=0.5
    )
    return matches[0] if matches else None


class Fp8Error(Exception):
    """Something the user can put right.

    Args:
        message: one sentence that stands alone.
        key: dotted configuration key at fault, when there is one.
        value: the offending value.
        allowed: what is accepted instead.
        hint: what to do about it.
    """

    exit_code = 2

    def __init__(
        self,
        message: str,
        *,
        key: str | None = None,
        value: object = None,
        allowed: Iterable[object] | None = None,
        hint: str | None = None,
    ) -> None:
        self.message = message
        self.key = key
        self.value = value
        self.allowed = tuple(allowed) if allowed is not None else None
        self.hint = hint
        super().__init__(str(self))

    def __str__(self) -> str:
        parts = [self.message.rstrip()]
        if self.allowed is not None:
            parts.append("Allowed: " + ", ".join(str(item) for item in self.allowed) + ".")
        if self.hint:
            parts.append(self.hint.rstrip())
        return " ".join(parts)


class RecipeError(Fp8Error):
    """A recipe that does not exist or options it cannot take."""


class ConfigError(Fp8Error):
    """A configuration that does not compose: unknown key, wrong type, impossible value."""


class PreflightError(Fp8Error):
    """The job would fail: preflight found errors, kept in `findings`."""

    def __init__(self, message: str, *, findings: Iterable[object] = (), **details: object) -> None:
        self.findings = tuple(findings)
        super().__init__(message, **details)  # type: ignore[arg-type]  # forwards Fp8Error's own keywords


class InjectionError(Fp8Error):
    """The recipe cannot be put into this model, or did not arrive in it."""


class EmulationError(Fp8Error):
    """The emulated device cannot be installed, or was asked for where it must not run."""


class CheckpointError(Fp8Error):
    """A checkpoint that is missing, incomplete, corrupt or of another configuration."""


class DependencyError(Fp8Error, ImportError):
    """A package that this one depends on is not installed."""


class DataError(Fp8Error):
    """Training data that is missing or cannot be read."""


class RunDirectoryError(Fp8Error):
    """A run directory that cannot be created, written or continued."""


class ReportError(Fp8Error):
    """A report that cannot be made from what the run directory holds."""
