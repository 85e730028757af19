"""Placeholders for packages that are imported at module level and never used on the emulated device.

They are there while one module is being executed and gone after it, so that nobody who asks later whether
triton is installed is told that it is. A package that is installed always wins.
"""

# ruff: noqa: ARG002 -- the signatures are importlib's

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

__all__ = ["placeholders"]


@contextmanager
def placeholders(packages: Iterable[str]) -> Iterator[None]:
    """In the block, those of `packages` that are not installed import as modules of placeholders.

    Args:
        packages: dotted names; a submodule of an installed package may be one.
    """
    missing = tuple(name for name in packages if name not in sys.modules and not _installed(name))
    finder = _Finder(missing)
    before = set(sys.modules)
    sys.meta_path.insert(0, finder)  # before a folder of that name is found
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            if isinstance(sys.modules[name], _PlaceholderModule):
                del sys.modules[name]


def _installed(name: str) -> bool:
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # its parent is missing
        return False
    # Any folder without an __init__ can be imported; it has no origin.
    return spec is not None and spec.origin is not None


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the missing packages, their missing parents, and every submodule asked for, as placeholders."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        parents = {name.rsplit(".", count)[0] for name in names for count in range(1, name.count(".") + 1)}
        self._parents = {name for name in parents if name not in sys.modules and not _installed(name)}

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._parents and not any(
            f"{fullname}.".startswith(f"{name}.") for name in self._names
        ):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _PlaceholderModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        return None


class _PlaceholderModule(types.ModuleType):
    __version__ = "0"  # TE asks triton for it at import; of its two branches the older one is the plainer

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Placeholder(f"{self.__name__}.{name}")


class _Placeholder:
    """A name of a package that is not installed: enough for decorators, annotations and class bodies at
    import.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def __call__(self, *args: Any, **_kwargs: Any) -> Any:
        """As a decorator returns the function, Triton's a kernel; anything else makes another placeholder."""
        if len(args) == 1 and isinstance(args[0], types.FunctionType):
            return _Kernel(args[0].__name__) if self._package == "triton" else args[0]
        if len(args) == 1 and isinstance(args[0], _Kernel):  # of several decorators one
            return args[0]
        return _Placeholder(f"{self._path}(…)")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Placeholder(f"{self._path}.{name}")

    @property
    def _package(self) -> str:
        return self._path.split(".", 1)[0]

    def __getitem__(self, _item: Any) -> Any:
        raise NotImplementedError(f"{self._package} is not installed ({self._path} was used).")

    # A number, or something to reckon with, is wanted: it is no import any more.
    __lt__ = __gt__ = __le__ = __ge__ = __add__ = __radd__ = __mul__ = __rmul__ = __getitem__
    __sub__ = __rsub__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __getitem__

    def __mro_entries__(self, _bases: tuple[Any, ...]) -> tuple[type, ...]:
        return ()  # as a base class

    def __or__(self, other: Any) -> Any:
        return other  # in an annotation that is evaluated: `Missing | None`

    __ror__ = __or__

    def __repr__(self) -> str:
        return f"<{self._path}, not installed>"


class _Kernel(_Placeholder):
    """A function that triton would compile: it is launched by subscript."""

    def __getitem__(self, _grid: Any) -> Any:
        raise NotImplementedError(
            f"The Triton kernel {self._path} cannot run: the device is emulated, and triton is not installed."
        )
