"""Compiled kernels for what telemetry finds out about host tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nemo_fp8_recipes.emulation.ledger import PatchLedger

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_fp8_recipes.emulation.kernels import Library
    from nemo_fp8_recipes.telemetry.coded import Coded
    from nemo_fp8_recipes.telemetry.probes.scale_codes import ScaleFormat

__all__ = ["apply"]


def apply(ledger: PatchLedger) -> None:
    """Fill the names of `nemo_fp8_recipes.telemetry.host_kernels`. Nothing is compiled before one is used."""
    from nemo_fp8_recipes.telemetry import host_kernels

    for name, function in _functions().items():
        ledger.set(host_kernels, name, function, "a host tensor takes many torch operations, or one kernel")


def _functions() -> Mapping[str, Callable[..., Any]]:
    """Functions by their names in `host_kernels`."""
    return {
        "history_windows": _history_windows,
        "measure": _measure,
        "scale_counts": _scale_counts,
        "scale_distribution": _scale_distribution,
        "stacked_rows": _stacked_rows,
    }


def _stacked_rows(tensors: Sequence[Tensor], row: int) -> Tensor | None:
    kernels = _library()
    return kernels.stacked_rows(tensors, row) if kernels is not None else None


def _history_windows(
    histories: Sequence[Tensor], oldest: Tensor, last: Tensor, slots: Tensor
) -> Tensor | None:
    kernels = _library()
    return kernels.history_windows(histories, oldest, last, slots) if kernels is not None else None


def _measure(source: Tensor, coded: Coded, first: int = 0, bulk: Tensor | None = None) -> Tensor | None:
    from nemo_fp8_recipes.emulation.kernels import for_tensor, on_host

    kernels = for_tensor(source) if on_host(coded.codes) else None
    return kernels.measure(source, coded, first, bulk) if kernels is not None else None


def _scale_counts(
    scales: Sequence[Tensor], grids: Tensor, slots: Tensor, operands: int
) -> tuple[Tensor, Tensor | None] | None:
    kernels = _library()
    return kernels.scale_counts(scales, grids, slots, operands) if kernels is not None else None


def _scale_distribution(counts: Tensor, fmt: ScaleFormat, **described: Any) -> Tensor | None:
    from nemo_fp8_recipes.emulation.kernels import on_host

    kernels = _library() if on_host(counts) else None
    return kernels.scale_distribution(counts, fmt, **described) if kernels is not None else None


def _library() -> Library | None:
    return _loader()()


@functools.cache
def _loader() -> Callable[[], Library | None]:
    """What gives the kernels, imported once: an import statement looks its module up in every call."""
    from nemo_fp8_recipes.emulation.kernels import library

    return library
