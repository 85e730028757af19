"""Flags among Hydra overrides."""

from __future__ import annotations

from collections.abc import Iterable

from nemo_fp8_recipes.errors import ConfigError, nearest

__all__ = ["take_flags", "take_options"]


def take_flags(arguments: Iterable[str], known: Iterable[str]) -> tuple[set[str], list[str]]:
    """The flags of a command among its arguments, and the overrides that are left.

    Raises:
        ConfigError: for a flag that the command does not have.
    """
    known = set(known)
    flags: set[str] = set()
    overrides: list[str] = []
    for argument in arguments:
        if not argument.startswith("-"):
            overrides.append(argument)
        elif argument in known:
            flags.add(argument)
        else:
            close = nearest(argument, known)
            raise ConfigError(
                f"There is no option '{argument}'.",
                value=argument,
                allowed=sorted(known),
                hint=f"Did you mean '{close}'?" if close else None,
            )
    return flags, overrides


def take_options(arguments: Iterable[str], known: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Options with a value, `--name VALUE` or `--name=VALUE`, and the arguments that are left.

    Raises:
        ConfigError: for one without a value.
    """
    known = set(known)
    found: dict[str, list[str]] = {}
    rest: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if name not in known:
            rest.append(argument)
            continue
        if not equals:
            value = next(remaining, "")
        if not value:
            raise ConfigError(f"{name} needs a value.", key=name)
        found.setdefault(name, []).append(value)
    return found, rest
