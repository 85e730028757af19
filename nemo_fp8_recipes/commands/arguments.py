"""Flags among Hydra overrides."""

from __future__ import annotations

from collections.abc import Iterable

from nemo_fp8_recipes.errors import ConfigError, nearest

__all__ = ["take_flags"]


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
