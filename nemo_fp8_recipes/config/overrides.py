"""Overrides as the user typed them: syntax, groups, and other tools' recipe names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from nemo_fp8_recipes import recipes
from nemo_fp8_recipes.config.paths import groups, options
from nemo_fp8_recipes.errors import ConfigError, RecipeError, nearest

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

__all__ = ["alias_notes", "parse", "translate"]

RECIPE_GROUP = "fp8_recipe"


def parse(arguments: Sequence[str]) -> list[Override]:
    """Hydra's reading of `arguments`.

    Raises:
        ConfigError: for an argument that is no override, of broken syntax, or with several values.
        RecipeError: for a recipe that does not exist.
    """
    parser = OverridesParser.create()
    return [_parse_one(parser, argument) for argument in arguments]


def _parse_one(parser: OverridesParser, argument: str) -> Override:
    if argument.startswith("-"):
        raise ConfigError(
            f"There is no option '{argument}'.",
            value=argument,
            hint="Settings are given as key=value; see --help.",
        )
    if argument.startswith("="):
        raise ConfigError(f"'{argument}' has no key before the equals sign.", value=argument)
    if "=" not in argument and not argument.startswith("~"):
        raise ConfigError(
            f"'{argument}' is not of the form key=value.",
            value=argument,
            hint=f"Did you mean {RECIPE_GROUP}={argument.lower()}?"
            if _is_recipe(argument)
            else "See --help.",
        )
    try:
        override = parser.parse_overrides([argument])[0]
    except HydraException as error:
        detail = _said(error)
        raise ConfigError(
            f"'{argument}' cannot be read: {detail}.",
            value=argument,
            hint="Quote values with special characters twice: 'key=\"a b\"'.",
        ) from error
    if override.is_sweep_override():
        raise ConfigError(
            f"'{argument}' gives several values, and a job takes one.",
            key=override.key_or_group,
            value=argument,
            hint="Write a list in brackets: key=[a,b].",
        )
    _check_group(override, argument)
    return override


def _said(error: HydraException) -> str:
    """What Hydra has against an override, without the names of its parser's classes."""
    detail = str(error).splitlines()[0]
    if detail.startswith("LexerNoViableAltException"):
        return "it has a character that needs quotes"
    return detail.rstrip(".")


def _is_recipe(word: str) -> bool:
    try:
        recipes.resolve(word)
    except RecipeError:
        return False
    return True


def _check_group(override: Override, argument: str) -> None:
    """Refuse a choice that a group does not have, and a choice of recipe that is no choice."""
    group = override.key_or_group
    if group.split(".")[0] == "hydra":
        raise ConfigError(
            f"'{argument}' has no effect: there is no Hydra application to configure.", key=group
        )
    if group in (f"{RECIPE_GROUP}.name", f"{RECIPE_GROUP}.preset"):
        raise ConfigError(
            f"{group} cannot be changed by itself: every recipe has its own options.",
            key=group,
            value=override.value(),
            hint=f"Choose the recipe: {RECIPE_GROUP}={override.value()}.",
        )
    if group not in groups():
        return
    if override.package is not None:
        raise ConfigError(
            f"'{argument}' puts {group} elsewhere, and every part of the job reads it at its own place.",
            key=group,
            value=argument,
            hint=f"Write {group}={override.value()}.",
        )
    if override.is_delete() or override.is_add():
        raise ConfigError(
            f"'{argument}': every job has one choice of {group}.",
            key=group,
            value=argument,
            allowed=options(group),
            hint=f"Write {group}=choice.",
        )
    choice = override.value()
    if group == RECIPE_GROUP:
        if not isinstance(choice, str):
            raise RecipeError(
                f"{group}={'null' if choice is None else choice} names no recipe.",
                key=group,
                value=choice,
                allowed=recipes.names(),
                hint="fp8_recipe=bf16 quantises nothing.",
            )
        recipes.resolve(choice)
        return
    if choice not in options(group):
        close = nearest(str(choice), options(group))
        raise ConfigError(
            f"{group}={choice} is not available.",
            key=group,
            value=choice,
            allowed=options(group),
            hint=f"Did you mean '{close}'?" if close else None,
        )


def translate(overrides: Sequence[Override]) -> list[str]:
    """The overrides as text for Hydra, other tools' recipe names replaced by ours."""
    return [_for_hydra(override) for override in overrides]


def _for_hydra(override: Override) -> str:
    line = str(override.input_line)
    if override.key_or_group == RECIPE_GROUP:
        return f"{RECIPE_GROUP}={recipes.resolve(str(override.value())).choice}"
    if override.key_or_group.startswith("versions."):
        key, _, version = line.partition("=")
        if version[:1].isdigit():
            return f"{key}='{version}'"  # 2.20 is a version; as a number it would be 2.2
    return line


def alias_notes(arguments: Sequence[str]) -> list[str]:
    """What presets and other tools' recipe names among `arguments` became, in sentences for the user."""
    sentences = [
        recipes.resolve(str(override.value())).sentence()
        for override in parse(arguments)
        if override.key_or_group == RECIPE_GROUP
    ]
    return [sentence for sentence in sentences if sentence]
