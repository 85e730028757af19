"""From a name, an alias or a mapping to a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_fp8_recipes import typed
from nemo_fp8_recipes.errors import RecipeError, nearest
from nemo_fp8_recipes.recipes.aliases import ALIASES, NO_EQUIVALENT
from nemo_fp8_recipes.recipes.base import KEY, SCHEMA_VERSION, Recipe
from nemo_fp8_recipes.recipes.bf16 import Bf16
from nemo_fp8_recipes.recipes.blockwise import Blockwise
from nemo_fp8_recipes.recipes.delayed import Delayed
from nemo_fp8_recipes.recipes.mxfp8 import Mxfp8
from nemo_fp8_recipes.recipes.nvfp4 import Nvfp4
from nemo_fp8_recipes.recipes.presets import presets
from nemo_fp8_recipes.recipes.tensorwise import Tensorwise

__all__ = ["RECIPES", "Resolution", "load", "load_at", "names", "resolve"]

RECIPES: dict[str, type[Recipe]] = {
    recipe.name: recipe for recipe in (Bf16, Delayed, Tensorwise, Mxfp8, Blockwise, Nvfp4)
}


@dataclass(frozen=True)
class Resolution:
    """What a name became.

    Attributes:
        canonical: the recipe.
        alias: another tool's name as its vocabulary spells it; None for a name of ours.
        note: what the alias does not carry over, or misleads about.
        preset: the preset that sets options of the recipe; None for the recipe as it is.
    """

    canonical: str
    alias: str | None = None
    note: str = ""
    preset: str | None = None

    @property
    def choice(self) -> str:
        """The choice of the config group `fp8_recipe`."""
        return self.preset or self.canonical

    def sentence(self) -> str:
        """What to tell the user; empty for a canonical name."""
        parts = []
        if self.alias is not None:
            parts.append(
                f"fp8_recipe={self.alias} is {ALIASES[self.alias].vocabulary}'s name for {self.choice}."
            )
        if self.preset is not None:
            options = presets()[self.preset].options
            said = ", ".join(f"{key}={typed.spelled(value)}" for key, value in options.items())
            parts.append(f"{self.preset} is {self.canonical} with {said}.")
        return " ".join(part for part in (*parts, self.note) if part)


def names() -> tuple[str, ...]:
    """The canonical names, in the order they are documented."""
    return tuple(RECIPES)


def resolve(name: str) -> Resolution:
    """The recipe or preset that one of our names or another tool's name means, whatever its case.

    Megatron-Bridge writes its names with hyphens too.

    Raises:
        RecipeError: for a name of neither kind, with the nearest spelling.
    """
    lowered = name.lower().replace("-", "_")
    if lowered in RECIPES:
        return Resolution(lowered)
    for alias, entry in ALIASES.items():
        if alias.lower() == lowered:
            meant = resolve(entry.means)
            return Resolution(meant.canonical, alias, entry.note, meant.preset)
    if lowered in presets():
        return Resolution(presets()[lowered].base, preset=lowered)
    if lowered in NO_EQUIVALENT:
        raise RecipeError(
            f"There is no recipe '{name}'.",
            key=KEY,
            value=name,
            allowed=names(),
            hint=NO_EQUIVALENT[lowered],
        )
    close = nearest(name, [*RECIPES, *presets(), *(alias.lower() for alias in ALIASES)])
    canonical = resolve(close).canonical if close else None
    offered = f"Did you mean '{close}'" + (f" ({canonical})?" if canonical != close else "?")
    raise RecipeError(
        f"There is no recipe '{name}'.",
        key=KEY,
        value=name,
        allowed=names(),
        hint=offered if close else "See nemo-fp8 show --help.",
    )


def load(source: str | Recipe | Mapping[str, Any], /, **overrides: Any) -> Recipe:
    """A recipe from its name or preset, another recipe or a mapping with `name`; `overrides` change options.

    A mapping may say which `preset` it comes from: its values are already in it. An OmegaConf node is a
    mapping too. Nested options may be given in part:
    `load("tensorwise", fp8_gemm_fprop={"use_split_accumulator": True})`.

    Raises:
        RecipeError: for an unknown name or key, a wrong type, or options that the recipe cannot take.
    """
    if isinstance(source, Recipe):
        return _read(type(source), overrides, base=source)
    if isinstance(source, str):
        return _named(source, overrides)
    if not isinstance(source, Mapping):
        raise RecipeError(
            f"A recipe cannot be loaded from a {type(source).__name__}.",
            key=KEY,
            value=source,
            allowed=["a name", "a Recipe", "a mapping with 'name'"],
        )
    values = dict(source)
    name = values.pop("name", None)
    if not isinstance(name, str):
        raise RecipeError(f"{KEY}.name is missing.", key=f"{KEY}.name", value=name, allowed=names())
    preset = values.pop("preset", None)
    if preset is not None and preset not in presets():
        raise RecipeError(
            f"There is no preset '{preset}'.", key=f"{KEY}.preset", value=preset, allowed=list(presets())
        )
    version = values.pop("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise RecipeError(
            f"{KEY}.schema_version={version} is of another version of nemo_fp8_recipes.",
            key=f"{KEY}.schema_version",
            value=version,
            allowed=[SCHEMA_VERSION],
        )
    recipe = _read(RECIPES[resolve(name).canonical], values)
    return _read(type(recipe), overrides, base=recipe) if overrides else recipe


def load_at(key: str, source: str | Recipe | Mapping[str, Any]) -> Recipe:
    """`load`, for a recipe that is written elsewhere than under `fp8_recipe`: its errors name `key`.

    Raises:
        RecipeError: as `load`.
    """
    try:
        return load(source)
    except RecipeError as error:
        said = error.message.replace(KEY, key) if KEY in error.message else f"{key}: {error.message}"
        raise RecipeError(
            said,
            key=error.key.replace(KEY, key) if error.key else key,
            value=error.value,
            allowed=error.allowed,
            hint=error.hint,
        ) from error


def _named(name: str, overrides: Mapping[str, Any]) -> Recipe:
    resolution = resolve(name)
    cls = RECIPES[resolution.canonical]
    if resolution.preset is None:
        return _read(cls, overrides)
    recipe = _read(cls, presets()[resolution.preset].options)
    return _read(cls, overrides, base=recipe) if overrides else recipe


def _read(cls: type[Recipe], values: Mapping[str, Any], *, base: Recipe | None = None) -> Recipe:
    known = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key in known:
            continue
        owners = [
            name for name, other in RECIPES.items() if key in {f.name for f in dataclasses.fields(other)}
        ]
        if owners:
            raise RecipeError(
                f"{KEY}.{key} is an option of {', '.join(owners)}; fp8_recipe={cls.name} has no such option.",
                key=f"{KEY}.{key}",
                value=values[key],
                allowed=known or None,
            )
    if not known and values:
        unknown = next(iter(values))
        raise RecipeError(
            f"There is no key '{KEY}.{unknown}': fp8_recipe={cls.name} has no options.",
            key=f"{KEY}.{unknown}",
        )
    return typed.read(cls, values, key=KEY, error=RecipeError, base=base)
