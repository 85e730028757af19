"""The rules and their codes. A rule is a function with a code, in a file of `rules/`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from nemo_fp8_recipes.preflight.finding import Finding, Severity
from nemo_fp8_recipes.preflight.inputs import PreflightInput

__all__ = ["Problem", "Rule", "all_rules", "rule"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a rule found; the rule's own code, severity and source make it a `Finding`."""

    message: str
    key: str | None = None
    value: Any = None
    fix: str = ""
    severity: Severity | None = None
    """Only where this one is graver or lighter than the rule's."""
    source: str | None = None
    """Only where this one comes from somewhere more exact than the rule's."""


Check = Callable[[PreflightInput], Iterator[Problem]]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One check: stable code, what it is about, where it comes from."""

    code: str
    severity: Severity
    title: str
    source: str
    versions: str
    check: Check

    def findings(self, job: PreflightInput) -> Iterator[Finding]:
        for problem in self.check(job):
            yield Finding(
                code=self.code,
                severity=problem.severity or self.severity,
                message=problem.message,
                key=problem.key,
                value=problem.value,
                fix=problem.fix,
                source=problem.source or self.source,
                versions=self.versions,
            )


_RULES: dict[str, Rule] = {}


def rule(
    code: str, severity: Severity, title: str, *, source: str, versions: str = ""
) -> Callable[[Check], Check]:
    """Register a check under a code that is never given to another one."""

    def register(check: Check) -> Check:
        if code in _RULES:
            raise ValueError(f"two preflight rules have the code {code}")
        _RULES[code] = Rule(
            code=code, severity=severity, title=title, source=source, versions=versions, check=check
        )
        return check

    return register


def all_rules() -> dict[str, Rule]:
    """Every rule by its code, in the order of the codes."""
    from nemo_fp8_recipes.preflight import rules

    for module in pkgutil.iter_modules(rules.__path__):
        importlib.import_module(f"{rules.__name__}.{module.name}")
    return dict(sorted(_RULES.items()))
