"""What every family of kernels needs: the loaded library, its threads, and tensors as C sees them.

A family is a class of the functions that belong to one format. It binds them by name in its `__init__`, and
`Library` is all families together.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_fp8_recipes.numerics.formats import E4M3, Fp8Format

__all__ = [
    "ADDRESS",
    "FLOAT",
    "INPUTS",
    "INT",
    "KEY",
    "LONG",
    "MATRIX",
    "NOTHING",
    "Native",
    "Quantized",
    "address",
    "format_tag",
    "input_tag",
]

ADDRESS = ctypes.c_void_p
INT = ctypes.c_int32
LONG = ctypes.c_int64
KEY = ctypes.c_uint64
FLOAT = ctypes.c_float
MATRIX = (ADDRESS, INT, LONG, LONG)
"""Arguments of an input matrix: address, type, rows, columns."""

INPUTS: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Input types and the tags that the C++ knows them by."""

# What a core quantises in the time that it takes to get another one to work: a waiting thread of torch's, or
# a new one (some 20 us).
_ELEMENTS_A_TEAM_THREAD = 1 << 13
_ELEMENTS_A_NEW_THREAD = 1 << 16


class Quantized(NamedTuple):
    """Where one direction's codes and scales go: contiguous tensors."""

    codes: Tensor | None
    scales: Tensor | None

    @property
    def stride(self) -> int:
        """Elements between two rows of scales."""
        return 0 if self.scales is None else self.scales.shape[1]


NOTHING = Quantized(None, None)


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's first element lies; None for None."""
    return None if tensor is None else tensor.data_ptr()


def input_tag(x: Tensor) -> int:
    return INPUTS[x.dtype]


def format_tag(fmt: Fp8Format) -> int:
    return 0 if fmt is E4M3 else 1


class Native:
    """A loaded library and the threads that its functions run on.

    Args:
        loaded: what `build.load` returns.
        team: address of the `GOMP_parallel` whose threads they run on, None for threads of their own. They
            use as many as torch does. In a forked child they go on with threads of their own.
    """

    def __init__(self, loaded: ctypes.CDLL, team: int | None = None) -> None:
        self._loaded = loaded
        self.bind("use_team", None, ADDRESS)(team)
        self._has_team = self.bind("has_team", INT)

    def bind(self, name: str, result: object, *arguments: object) -> Callable[..., Any]:
        """The library's function `nemo_fp8_<name>`, of these ctypes types."""
        function = self._loaded[f"nemo_fp8_{name}"]
        function.restype = result  # type: ignore[assignment]  # a ctypes type or None
        function.argtypes = arguments  # type: ignore[assignment]  # ctypes types
        return function

    def threads(self, elements: int) -> int:
        """How many threads work of this many elements is worth, of those that torch may use."""
        available = torch.get_num_threads()
        if available == 1:
            return 1
        share = _ELEMENTS_A_TEAM_THREAD if self._has_team() else _ELEMENTS_A_NEW_THREAD
        return max(1, min(available, elements // share))
