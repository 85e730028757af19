"""What preflight says: one finding a problem (docs/schemas/finding.md, schema version 1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from nemo_fp8_recipes.errors import PreflightError

__all__ = ["SCHEMA_VERSION", "SEVERITIES", "Finding", "Severity", "require", "worst_first"]

SCHEMA_VERSION = 1

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that will fail (error), that hurts (warning), or that is good to know (info).

    `code` is stable; `key` is the dotted configuration key at fault and `value` what it holds; `fix` is what
    to do; `source` is where the rule comes from; `versions` of which package it holds for.
    """

    code: str
    severity: Severity
    message: str
    key: str | None = None
    value: Any = None
    fix: str = ""
    source: str = ""
    versions: str = ""

    def to_dict(self) -> dict[str, Any]:
        """A mapping that JSON can hold."""
        return {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}

    def sentence(self) -> str:
        """Message and fix in one line."""
        return f"{self.message} {self.fix}".rstrip()


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Errors, then warnings, then the rest; within these by code and key."""
    return sorted(
        findings, key=lambda finding: (SEVERITIES.index(finding.severity), finding.code, finding.key or "")
    )


def require(findings: Iterable[Finding]) -> None:
    """Go on only where nothing would fail.

    Raises:
        PreflightError: with the errors in `findings`; its message holds all of them.
    """
    errors = [finding for finding in worst_first(findings) if finding.severity == "error"]
    if not errors:
        return
    said = " ".join(f"[{finding.code}] {finding.sentence()}" for finding in errors)
    raise PreflightError(
        f"This would fail: {said}", findings=errors, key=errors[0].key, value=errors[0].value
    )
