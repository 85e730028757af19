"""Kernels that do on host tensors in one pass what telemetry's torch operations do in many.

On a GPU there are none: there torch's operations are kernels, and nothing here is set. The emulated device
puts its compiled ones here while it is installed (`emulation/telemetry.py`), and takes them away with itself;
this package never imports it. Every name in `__all__` is a function or None:

    kernel = host_kernels.name
    found = kernel(...) if kernel is not None else None
    if found is None:
        ...  # the torch operations, which say what is computed

A kernel gives None for what it does not do: there is no compiler here, the tensors are not on the host, a
dtype that it does not read. It gives the same numbers as the torch operations, sums but for the order of
summation.

To add one: its name here and in `__all__`, with its type and the function that is its reference; the function
itself in `emulation/kernels/`, a class on top of `native.Native`; its line in `emulation/telemetry.py`; and a
test that compares it with its reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_fp8_recipes.telemetry.coded import Coded
    from nemo_fp8_recipes.telemetry.probes.scale_codes import ScaleFormat

__all__ = ["history_windows", "measure", "scale_counts", "scale_distribution", "stacked_rows"]


class _ScaleDistribution(Protocol):
    def __call__(
        self,
        counts: Tensor,
        fmt: ScaleFormat,
        *,
        blocks: Tensor,
        kept: Tensor,
        exact: Tensor | None,
        slots: Tensor,
    ) -> Tensor | None: ...


class _Measure(Protocol):
    def __call__(
        self, source: Tensor, coded: Coded, first: int = 0, bulk: Tensor | None = None
    ) -> Tensor | None: ...


history_windows: Callable[[Sequence[Tensor], Tensor, Tensor, Tensor], Tensor | None] | None = None
"""`probes.delayed.history_windows`."""

measure: _Measure | None = None
"""`elements.measure` of a tensor that is not empty and `probes.stored.values` of its codes; with `bulk`, of
the elements from `first` on and `probes.parts.values_between`.
"""

scale_counts: (
    Callable[[Sequence[Tensor], Tensor, Tensor, int], tuple[Tensor, Tensor | None] | None] | None
) = None
"""`probes.blocks.BlockProbe._counted` of scales, their grids, their slots and the number of operands."""

scale_distribution: _ScaleDistribution | None = None
"""`probes.blocks.BlockProbe._described` of counts."""

stacked_rows: Callable[[Sequence[Tensor], int], Tensor | None] | None = None
"""`probes.delayed.stacked_rows`."""
