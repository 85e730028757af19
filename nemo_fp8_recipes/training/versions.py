"""Versions of what a run stands on, as installed. Imports none of it."""

from __future__ import annotations

import platform
from importlib import metadata

from nemo_fp8_recipes import __version__

__all__ = ["installed_versions"]

PACKAGES = ("torch", "megatron-core", "transformer-engine")


def installed_versions(*more: str) -> dict[str, str | None]:
    """Package name -> version, `more` packages included; None for what is not installed under that name."""
    versions: dict[str, str | None] = {"nemo-fp8-recipes": __version__, "python": platform.python_version()}
    for package in dict.fromkeys((*PACKAGES, *more)):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions
