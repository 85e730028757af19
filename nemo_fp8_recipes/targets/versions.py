"""Installed versions of the peers, read from package metadata: nothing is imported."""

from __future__ import annotations

import functools
import importlib.metadata
import re

__all__ = ["at_least", "installed", "parse"]

_RELEASE = re.compile(r"\d+(?:\.\d+)*")


def installed(package: str) -> str | None:
    """Version of an installed package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def parse(version: str) -> tuple[int, ...]:
    """The numbers of a release, (2, 20, 2) for "2.20.2+4f1c"; empty for a version without numbers."""
    found = _RELEASE.match(version.strip().removeprefix("v"))
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def at_least(version: str, minimum: str) -> bool:
    """Whether `version` is `minimum` or later; a development build of a release counts as that release."""
    return parse(version) >= parse(minimum)
