"""Recognising classes of Transformer Engine and Megatron-Core without importing either.

A model can only contain modules of packages that are loaded, so reading one never needs an import, and a
model of plain torch modules is read in an environment that has neither.
"""

from __future__ import annotations

__all__ = ["derives_from"]


def derives_from(value: object, package: str, *names: str) -> bool:
    """Whether a class called one of `names` and defined in `package` is among the bases of `value`'s
    class.
    """
    return any(
        base.__name__ in names and base.__module__.split(".", 1)[0] == package for base in type(value).__mro__
    )
