"""Every change the emulated device makes to other people's modules, in a form that can be listed and
undone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Patch", "PatchLedger"]

_ABSENT: Any = object()


@dataclass(frozen=True)
class Patch:
    """One change.

    Attributes:
        target: what was changed, as an import path: "torch.cuda.is_available", "sys.modules['…']".
        reason: why the stack needs it on a machine with no GPU.
        undo: restores what was there.
    """

    target: str
    reason: str
    undo: Callable[[], None]


class PatchLedger:
    """Makes changes and remembers how to take each one back."""

    def __init__(self) -> None:
        self._patches: list[Patch] = []
        self._stand_ins: dict[int, Any] = {}

    def set(self, owner: Any, name: str, value: Any, reason: str) -> None:
        """Set the attribute `name` of a module or class; what the owner itself held before is remembered."""
        before = vars(owner).get(name, _ABSENT)
        setattr(owner, name, value)
        if value is not before and callable(value):
            self._stand_ins[id(value)] = value

        def undo() -> None:
            if before is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

        self._patches.append(Patch(f"{_path(owner)}.{name}", reason, undo))

    def put(
        self, mapping: MutableMapping[str, Any], key: str, value: Any, reason: str, *, called: str
    ) -> None:
        """Set an item of a mapping such as `sys.modules`; `called` names the mapping in the list."""
        before = mapping.get(key, _ABSENT)
        mapping[key] = value

        def undo() -> None:
            if before is _ABSENT:
                mapping.pop(key, None)
            else:
                mapping[key] = before

        self._patches.append(Patch(f"{called}[{key!r}]", reason, undo))

    def add(self, target: str, reason: str, undo: Callable[[], None]) -> None:
        """Record a change made elsewhere."""
        self._patches.append(Patch(target, reason, undo))

    def __iter__(self) -> Any:
        return iter(tuple(self._patches))

    def __len__(self) -> int:
        return len(self._patches)

    def stand_ins(self) -> frozenset[int]:
        """The ids of the functions and classes that `set` put in somebody's place."""
        return frozenset(self._stand_ins)

    def undo(self) -> None:
        """Take every change back, the last one first."""
        while self._patches:
            self._patches.pop().undo()
        self._stand_ins.clear()


def _path(owner: Any) -> str:
    if isinstance(owner, type):
        return f"{owner.__module__}.{owner.__qualname__}"
    name = getattr(owner, "__name__", None)
    return str(name) if name in sys.modules else repr(owner)
