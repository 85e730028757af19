"""The rules and their codes. A rule is a function with a code, in a file of `rules/`."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from nemo_fp8_recipes.preflight.citation import Citation, in_one_line
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
    source: str | Citation | None = None
    """Only where this one comes from somewhere more exact than the rule's."""


Check = Callable[[PreflightInput], Iterator[Problem]]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One check: stable code, what it is about, where it comes from.

    `cites` are the lines of the peers' sources among the sources; the rest are papers and threads.
    """

    code: str
    severity: Severity
    title: str
    sources: tuple[str | Citation, ...]
    versions: str
    check: Check
    of_gpu: bool = True
    """Whether another GPU can change what it finds."""

    @property
    def source(self) -> str:
        """All sources in one line."""
        return in_one_line(self.sources)

    @property
    def cites(self) -> tuple[Citation, ...]:
        return tuple(source for source in self.sources if isinstance(source, Citation))

    def findings(self, job: PreflightInput) -> Iterator[Finding]:
        for problem in self.check(job):
            yield Finding(
                code=self.code,
                severity=problem.severity or self.severity,
                message=problem.message,
                key=problem.key,
                value=problem.value,
                fix=problem.fix,
                source=str(problem.source) if problem.source else self.source,
                versions=self.versions,
            )


_RULES: dict[str, Rule] = {}


def rule(
    code: str,
    severity: Severity,
    title: str,
    *,
    source: str | Citation | tuple[str | Citation, ...],
    versions: str = "",
    of_gpu: bool = True,
) -> Callable[[Check], Check]:
    """Register a check under a code that is never given to another one.

    `of_gpu=False` says that it does not look at the hardware: `check_on` runs it once for all GPUs.
    """

    def register(check: Check) -> Check:
        if code in _RULES:
            raise ValueError(f"two preflight rules have the code {code}")
        _RULES[code] = Rule(
            code=code,
            severity=severity,
            title=title,
            sources=source if isinstance(source, tuple) else (source,),
            versions=versions,
            check=check,
            of_gpu=of_gpu,
        )
        return check

    return register


@functools.cache
def all_rules() -> Mapping[str, Rule]:
    """Every rule by its code, in the order of the codes."""
    from nemo_fp8_recipes.preflight import rules

    for module in pkgutil.iter_modules(rules.__path__):
        importlib.import_module(f"{rules.__name__}.{module.name}")
    return MappingProxyType(dict(sorted(_RULES.items())))
