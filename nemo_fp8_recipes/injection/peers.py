"""Recognising classes of Transformer Engine and Megatron-Core without importing either.

A model can only contain modules of packages that are loaded, so reading one never needs an import, and a
model of plain torch modules is read in an environment that has neither.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

__all__ = ["derives_from"]


def derives_from(value: object, package: str, *names: str) -> bool:
    """Whether a class called one of `names` and defined in `package` is among the bases of `value`'s
    class.
    """
    kind: Any = type(value)
    return _derives(kind, package, names)


@functools.lru_cache(maxsize=4096)
def _derives(kind: Hashable, package: str, names: tuple[str, ...]) -> bool:
    return any(
        base.__name__ in names and base.__module__.split(".", 1)[0] == package
        for base in getattr(kind, "__mro__", ())
    )
