"""Whose trainer runs the job `nemo-fp8 train` describes: `framework=megatron_core|nemo|bridge`.

Each framework is a module with

    def run_session(settings: Settings, invocation: Invocation) -> int

that trains `settings` and leaves the same run directory behind. This module knows where it is and whether
what it needs is installed; it imports neither torch nor the framework.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_fp8_recipes.errors import ConfigError

if TYPE_CHECKING:
    from nemo_fp8_recipes.training.invocation import Invocation
    from nemo_fp8_recipes.training.settings import Settings

__all__ = ["FRAMEWORKS", "Framework", "find"]


@dataclass(frozen=True)
class Framework:
    """A trainer that can run the job.

    Attributes:
        name: the choice of the config group.
        title: what people call it.
        session: the module with `run_session`.
        package: the import path that has to exist; found on disk, never imported here.
        distribution: what provides it, and whose version belongs into the run's record.
        install: what to install, at which versions.
        changes_recipes: its session follows `recipe_schedule` and `recipe_modules`.
        without_package: why a release of the distribution may lack `package`, and what to do then.
    """

    name: str
    title: str
    session: str
    package: str
    distribution: str
    install: str
    changes_recipes: bool = False
    without_package: str = ""

    def require_installed(self) -> None:
        """Raise `ConfigError` saying what to install when the framework cannot be imported here."""
        if _exists(self.package):
            return
        installed = _version(self.distribution)
        top = self.package.partition(".")[0]
        if installed is not None and _exists(top) and self.without_package:
            raise ConfigError(
                f"framework={self.name} needs {self.package}, which {self.distribution} {installed} does not "
                f"have: {self.without_package}.",
                key="framework",
                value=self.name,
                hint=self.install,
            )
        raise ConfigError(
            f"framework={self.name} needs {self.title}, which is not installed here.",
            key="framework",
            value=self.name,
            hint=self.install,
        )

    def require_one_recipe(self, settings: Settings) -> None:
        """Raise `ConfigError` where the job changes its recipe over steps or modules and this framework's
        session cannot follow.
        """
        changing = {"recipe_schedule": settings.schedule.spans, "recipe_modules": settings.modules}
        key = next((key for key, value in changing.items() if value), None)
        if key is not None and not self.changes_recipes:
            raise ConfigError(
                f"framework={self.name} trains everything with one recipe, and {key} names others.",
                key=key,
                allowed=[[]],
                hint=f"Leave {key} out, or use framework=megatron_core.",
            )

    def load(self) -> Callable[[Settings, Invocation], int]:
        """`run_session` of this framework. Call it once the device is in place: it imports torch.

        Raises:
            ConfigError: this installation of the package has no such trainer.
        """
        try:
            module: Any = importlib.import_module(self.session)
        except ModuleNotFoundError as error:
            if error.name != self.session:
                raise
            raise ConfigError(
                f"framework={self.name} is not part of this installation: there is no {self.session}.",
                key="framework",
                value=self.name,
            ) from error
        session: Callable[[Settings, Invocation], int] = module.run_session
        return session


FRAMEWORKS: dict[str, Framework] = {
    framework.name: framework
    for framework in (
        Framework(
            name="megatron_core",
            title="Megatron-Core",
            session="nemo_fp8_recipes.training.session",
            package="megatron.core",
            distribution="megatron-core",
            changes_recipes=True,
            install="Install megatron-core 0.15 or 0.16; without a GPU: pip install 'nemo-fp8-recipes[cpu]'.",
        ),
        Framework(
            name="nemo",
            title="NeMo 2",
            session="nemo_fp8_recipes.training.frameworks.nemo",
            package="nemo.collections.llm",
            distribution="nemo_toolkit",
            install="Install nemo_toolkit[lightning]==2.7.3 with megatron-core==0.15.3 and nemo_run; "
            "without a GPU: make train-nemo.",
            without_package="NeMo 3 dropped the collection of language models, whose successor is "
            "Megatron-Bridge: use framework=bridge, or install nemo_toolkit 2.7.3",
        ),
        Framework(
            name="bridge",
            title="Megatron-Bridge",
            session="nemo_fp8_recipes.training.frameworks.bridge",
            package="megatron.bridge",
            distribution="megatron-bridge",
            install="Install megatron-bridge 0.6.2 with megatron-core 0.19.2, or 0.3.1 with 0.16.1; "
            "without a GPU: make train-bridge.",
        ),
    )
}


def find(name: str) -> Framework:
    """The framework of that name. Raises `ConfigError` when there is none, or it is not installed here."""
    if name not in FRAMEWORKS:
        raise ConfigError(
            f"framework={name} is not available.", key="framework", value=name, allowed=FRAMEWORKS
        )
    framework = FRAMEWORKS[name]
    framework.require_installed()
    return framework


def _exists(package: str) -> bool:
    """Whether an importable package stands at this path. Parents are found on disk, not imported."""
    top, *rest = package.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    if spec is None:
        return False
    roots = [Path(root) for root in spec.submodule_search_locations or ()]
    return not rest or any(root.joinpath(*rest).is_dir() for root in roots)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
