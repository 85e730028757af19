"""Changing a module when it is first imported, before anyone reads it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType

from nemo_fp8_recipes.emulation.ledger import PatchLedger

__all__ = ["after_import", "around_import"]


def after_import(ledger: PatchLedger, name: str, change: Callable[[ModuleType], None], reason: str) -> None:
    """Call `change(module)` when the module `name` has been executed for the first time.

    The module must not be imported yet. The hook removes itself once it has run.
    """
    around_import(ledger, name, _then(change), reason)


def around_import(
    ledger: PatchLedger, name: str, context: Callable[[ModuleType], AbstractContextManager[None]], reason: str
) -> None:
    """Execute the module `name` inside `context(module)`, the first time that it is imported."""
    finder = _Finder(name, context)
    sys.meta_path.insert(0, finder)
    ledger.add(f"import of {name}", reason, finder.remove)


def _then(change: Callable[[ModuleType], None]) -> Callable[[ModuleType], AbstractContextManager[None]]:
    @contextmanager
    def context(module: ModuleType) -> Iterator[None]:
        yield
        change(module)

    return context


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, context: Callable[[ModuleType], AbstractContextManager[None]]) -> None:
        self._name = name
        self._context = context

    def remove(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        self.remove()
        for finder in sys.meta_path:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                break
        else:
            return None
        if spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._context)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(
        self, real: importlib.abc.Loader, context: Callable[[ModuleType], AbstractContextManager[None]]
    ) -> None:
        self._real = real
        self._context = context

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # From here on the module has its real loader: nothing of ours stays behind in it.
        if module.__spec__ is not None:
            module.__spec__.loader = self._real
        module.__loader__ = self._real
        with self._context(module):
            self._real.exec_module(module)
