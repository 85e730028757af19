"""Where a recipe holds: modules that train with another one than `fp8_recipe`.

`recipe_modules=[{modules: "*.0.mlp.linear_fc2", recipe: bf16}]` keeps one linear layer out of FP8. The first
entry whose glob matches a module's path decides; what none matches trains with `fp8_recipe`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemo_fp8_recipes.errors import ConfigError, RecipeError
from nemo_fp8_recipes.recipes.base import Recipe
from nemo_fp8_recipes.recipes.registry import load, resolve

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from nemo_fp8_recipes.recipes.schedule import Schedule

__all__ = [
    "KEY",
    "ModuleRecipe",
    "ModulesConfig",
    "module_recipes_of",
    "read_module_recipes",
    "recipe_of_module",
    "recipes_of",
]

KEY = "recipe_modules"


@dataclass(frozen=True)
class ModulesConfig:
    """One entry of `recipe_modules` as it is written."""

    modules: str
    """A glob over module paths, as the manifest names them: "*linear_proj", "decoder.layers.[01].*"."""
    recipe: str
    """The name of a recipe; its options are Transformer Engine's defaults."""


@dataclass(frozen=True)
class ModuleRecipe:
    """Modules whose path matches `pattern` (a glob such as "*layers.0.*linear_fc2") train with `recipe`.

    Attributes:
        key: what the user wrote it as, for error messages.

    Raises:
        ConfigError: an empty pattern.
        RecipeError: no such recipe.
    """

    pattern: str
    recipe: str
    key: str = KEY

    def __post_init__(self) -> None:
        if not self.pattern.strip():
            raise ConfigError(
                f"{self.key} has an entry whose glob is empty.",
                key=self.key,
                value=str(self),
                allowed=["a glob over module paths, such as *.linear_proj"],
            )
        object.__setattr__(self, "recipe", resolve(self.recipe).choice)

    @classmethod
    def parse(cls, text: str) -> ModuleRecipe:
        """From "GLOB=RECIPE", the value of `--module`.

        Raises:
            ConfigError: not of that form.
        """
        pattern, equals, recipe = text.rpartition("=")
        if not equals:
            raise ConfigError(
                f"--module {text} is not of the form GLOB=RECIPE.",
                key="--module",
                value=text,
                hint="Example: --module '*linear_fc2=bf16'",
            )
        return cls(pattern, recipe, key="--module")

    def matches(self, path: str) -> bool:
        """Whether this entry speaks of the module at `path`; capitals count, as in Megatron's own matcher."""
        return fnmatch.fnmatchcase(path, self.pattern)

    def load(self) -> Recipe:
        """The recipe itself."""
        return load(self.recipe)

    def __str__(self) -> str:
        return f"{self.pattern}={self.recipe}"


def recipe_of_module(path: str, main: Recipe, modules: Sequence[ModuleRecipe]) -> Recipe:
    """The recipe that the module at `path` was asked to train with."""
    return next((entry.load() for entry in modules if entry.matches(path)), main)


def recipes_of(modules: Sequence[ModuleRecipe]) -> tuple[Recipe, ...]:
    """The recipes that the entries name, each once."""
    return tuple(dict.fromkeys(entry.load() for entry in modules))


def read_module_recipes(
    entries: Sequence[ModulesConfig | Mapping[str, Any]], schedule: Schedule
) -> tuple[ModuleRecipe, ...]:
    """The entries of `recipe_modules`, checked against the recipes of the job.

    Raises:
        ConfigError: an empty pattern.
        RecipeError: no such recipe, or a combination that Megatron cannot make.
    """
    read = [entry if isinstance(entry, ModulesConfig) else ModulesConfig(**entry) for entry in entries]
    modules = tuple(ModuleRecipe(entry.modules, entry.recipe) for entry in read)
    if not modules:
        return ()
    if schedule.main.precision == "bf16":
        raise RecipeError(
            f"{KEY} needs a quantised fp8_recipe: with bf16 Megatron enters no FP8 context.",
            key="fp8_recipe",
            value="bf16",
        )
    if getattr(schedule.main, "fp8_param", False):
        raise RecipeError(
            f"{KEY} cannot change the recipe of weights that are stored quantised.",
            key="fp8_recipe.fp8_param",
            value=True,
            allowed=[False],
        )
    quantised = next((entry for entry in modules if entry.recipe != "bf16"), None)
    if quantised is not None and schedule.spans:
        raise RecipeError(
            f"{KEY} quantises {quantised}, which would hold in every span of recipe_schedule too.",
            key=KEY,
            value=str(quantised),
            allowed=["bf16"],
            hint="Use one of the two, or bf16 for the modules.",
        )
    return modules


def module_recipes_of(config: DictConfig, schedule: Schedule) -> tuple[ModuleRecipe, ...]:
    """The `recipe_modules` of a composed configuration. Raises as `read_module_recipes`."""
    from omegaconf import OmegaConf

    entries: Any = OmegaConf.to_container(config.recipe_modules, resolve=True)
    return read_module_recipes(entries, schedule)
