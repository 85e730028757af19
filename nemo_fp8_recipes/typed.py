"""Typed construction of frozen configuration dataclasses from plain mappings.

OmegaConf knows neither `Literal` nor why a value is refused, so recipes and configuration groups are
checked here: an unknown key, a wrong type or a missing value is an error that names the dotted key, the
value, what is allowed and the nearest spelling. Imports neither torch nor OmegaConf.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from nemo_fp8_recipes.errors import Fp8Error, nearest

__all__ = ["coerce", "hints", "read", "spelled", "type_name", "unknown_key"]

T = TypeVar("T")
MISSING = "???"  # OmegaConf's marker for a value that the user has to give
_SCALARS: dict[type, str] = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
_CONTAINERS: dict[type, str] = {list: "a list", dict: "a mapping"}


def type_name(hint: Any) -> str:
    """What a value of this type is called in an error message."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return "any value"
    if hint in _SCALARS:
        return _SCALARS[hint]
    if hint is type(None):
        return "null"
    if origin is Literal:
        return " | ".join(str(choice) for choice in typing.get_args(hint))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(part) for part in typing.get_args(hint))
    if origin in (tuple, list) or hint in (tuple, list):
        return "a list"
    if dataclasses.is_dataclass(hint):
        return "a mapping with " + ", ".join(field.name for field in dataclasses.fields(hint))
    return "a mapping" if origin is dict or hint is dict else str(hint)


def spelled(value: Any) -> str:
    """A value as the user would write it in YAML."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _wrong_type(value: Any, hint: Any, key: str, error: type[Fp8Error]) -> Fp8Error:
    found = {**_SCALARS, **_CONTAINERS, type(None): "null"}.get(type(value), f"a {type(value).__name__}")
    if typing.get_origin(hint) is Literal and isinstance(value, str):
        choices = [str(choice) for choice in typing.get_args(hint)]
        close = nearest(value, choices)
        return error(
            f"{key}={value} is not available.",
            key=key,
            value=value,
            allowed=choices,
            hint=f"Did you mean '{close}'?" if close else None,
        )
    return error(
        f"{key}={spelled(value)} has the wrong type: {found}.",
        key=key,
        value=value,
        allowed=[type_name(hint)],
    )


def coerce(value: Any, hint: Any, key: str, error: type[Fp8Error], *, base: Any = None) -> Any:
    """`value` as a value of type `hint`, or `error` naming `key`.

    An integer is a number; a string of another case than a `Literal`'s choice is that choice; nothing else is
    converted. NaN and integers beyond 64 bits are values of no key, and an empty string is none of a key that
    can be null. `base` is the dataclass instance that a partial mapping changes.
    """
    if isinstance(value, str) and value == MISSING:
        raise error(f"{key} needs a value.", key=key, value=value, allowed=[type_name(hint)])
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(value, hint, key, error, base)
    if origin is Literal:
        for choice in typing.get_args(hint):
            if type(choice) is type(value) and choice == value:
                return choice
            if isinstance(choice, str) and isinstance(value, str) and choice.lower() == value.lower():
                return choice
        raise _wrong_type(value, hint, key, error)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return read(hint, value, key=key, error=error, base=base)
        raise _wrong_type(value, hint, key, error)
    if origin in (list, tuple):
        return _coerce_sequence(value, hint, origin, key, error)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong_type(value, hint, key, error)
        key_hint, value_hint = typing.get_args(hint)
        return {
            coerce(k, key_hint, key, error): coerce(v, value_hint, f"{key}.{k}", error)
            for k, v in value.items()
        }
    if type(value) is not hint and not (hint is float and type(value) is int):
        raise _wrong_type(value, hint, key, error)
    _check_scalar(value, key, error)
    return float(value) if hint is float else value


def _check_scalar(value: Any, key: str, error: type[Fp8Error]) -> None:
    """Refuse what has the right type and can be meant for nothing."""
    if isinstance(value, float) and math.isnan(value):
        raise error(f"{key}=nan is not a number.", key=key, value=value, allowed=["a finite number"])
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise error(
            f"{key}={value} is out of range.", key=key, value=value, allowed=["an integer of 64 bits"]
        )


def _coerce_union(value: Any, hint: Any, key: str, error: type[Fp8Error], base: Any) -> Any:
    parts = typing.get_args(hint)
    if value is None and type(None) in parts:
        return None
    others = [part for part in parts if part is not type(None)]
    if isinstance(value, str) and not value.strip() and type(None) in parts:
        # `key=` on the command line: a string, it would be the current directory or a flag without a value.
        raise error(f"{key} is empty.", key=key, value=value, allowed=[type_name(hint)])
    if len(others) == 1 and not (isinstance(value, str) and others[0] in (bool, int, float)):
        return coerce(value, others[0], key, error, base=base)
    for part in others:
        try:
            return coerce(value, part, key, error, base=base)
        except error:
            continue
    raise _wrong_type(value, hint, key, error)


def _coerce_sequence(value: Any, hint: Any, origin: Any, key: str, error: type[Fp8Error]) -> Any:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise _wrong_type(value, hint, key, error)
    arguments = typing.get_args(hint)
    if origin is tuple and not (len(arguments) == 2 and arguments[1] is Ellipsis):
        if len(arguments) != len(value):
            raise error(
                f"{key} has {len(value)} entries.",
                key=key,
                value=value,
                allowed=[f"{len(arguments)} entries"],
            )
        hints: Sequence[Any] = arguments
    else:
        hints = [arguments[0]] * len(value)
    items = [
        coerce(item, part, f"{key}[{index}]", error)
        for index, (item, part) in enumerate(zip(value, hints, strict=True))
    ]
    return tuple(items) if origin is tuple else items


def unknown_key(word: str, choices: Sequence[str], key: str, error: type[Fp8Error]) -> Fp8Error:
    """The error for a key that does not exist below `key`."""
    close = nearest(word, choices)
    full = f"{key}.{word}" if key else word
    return error(
        f"There is no key '{full}'.",
        key=full,
        allowed=sorted(choices),
        hint=f"Did you mean '{close}'?" if close else None,
    )


def read(
    cls: type[T], values: Mapping[str, Any], *, key: str, error: type[Fp8Error], base: T | None = None
) -> T:
    """An instance of the dataclass `cls` from a mapping; absent keys keep `base`'s or the default value.

    Raises:
        error: naming the dotted key below `key` for an unknown key, a wrong type or a missing value.
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]  # T is a dataclass
    types_of = hints(cls)
    arguments: dict[str, Any] = {name: getattr(base, name) for name in fields} if base is not None else {}
    for name, value in values.items():
        if name not in fields:
            raise unknown_key(str(name), list(fields), key, error)
        inner = getattr(base, name) if base is not None else _default(fields[name])
        inner = None if inner is dataclasses.MISSING else inner
        arguments[name] = coerce(value, types_of[name], f"{key}.{name}" if key else name, error, base=inner)
    for name, field in fields.items():
        if name not in arguments and _default(field) is dataclasses.MISSING:
            full = f"{key}.{name}" if key else name
            allowed = None if types_of[name] is Any else [type_name(types_of[name])]
            raise error(f"{full} needs a value.", key=full, allowed=allowed)
    return cls(**arguments)


_HINTS: dict[type, dict[str, Any]] = {}


def hints(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields; every class is asked once, because that is slow."""
    if cls not in _HINTS:
        _HINTS[cls] = typing.get_type_hints(cls)
    return _HINTS[cls]


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
