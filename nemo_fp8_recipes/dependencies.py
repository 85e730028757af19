"""The packages that nothing here works without: one sentence where an environment lacks some of them.

An environment may be older than a dependency: pip installed this package when it needed less.
"""

from __future__ import annotations

import importlib.util
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from nemo_fp8_recipes.errors import DependencyError

__all__ = ["REQUIRED", "Dependency", "explained", "require"]


@dataclass(frozen=True)
class Dependency:
    """A package of `dependencies` in pyproject.toml, which is what pip knows it by."""

    requirement: str
    module: str
    purpose: str
    """What needs it, as the subject of a sentence goes on: "it ..."."""

    @property
    def package(self) -> str:
        return self.requirement.partition(">=")[0]


REQUIRED = (
    Dependency("hydra-core>=1.3", "hydra", "composes every configuration"),
    Dependency("omegaconf>=2.3", "omegaconf", "holds every configuration"),
    Dependency("rich>=13", "rich", "draws progress and tables"),
    Dependency("pyarrow>=14", "pyarrow", "writes and reads the telemetry store"),
    Dependency("tensorboard>=2.9", "tensorboard", "gives the records of TensorBoard's event files"),
    Dependency("google-crc32c>=1.1", "google_crc32c", "computes the checksums of TensorBoard's event files"),
)


def require() -> None:
    """Look for all of them, importing none.

    Raises:
        DependencyError: some are not installed; it names each, and what to run.
    """
    missing = [one for one in REQUIRED if importlib.util.find_spec(one.module) is None]
    if missing:
        raise _error(missing)


@contextmanager
def explained() -> Iterator[None]:
    """An import within the block that fails for one of them says so.

    Raises:
        DependencyError: in place of that ModuleNotFoundError.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        top = (error.name or "").partition(".")[0]
        missing = [one for one in REQUIRED if one.module == top]
        if not missing:
            raise
        raise _error(missing) from error


def _error(missing: list[Dependency]) -> DependencyError:
    said = "; ".join(f"{one.package}, which {one.purpose}" for one in missing)
    packages = " ".join(shlex.quote(one.requirement) for one in missing)
    return DependencyError(
        f"This environment lacks what nemo-fp8-recipes needs: {said}.",
        key=missing[0].package,
        hint=f"Run: {shlex.quote(sys.executable)} -m pip install {packages}",
    )
