"""What telemetry reads of delayed scaling's amax histories, for all modules at once."""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.kernels.native import ADDRESS, LONG, Native

__all__ = ["HistoryKernels"]


class _Matrices:
    """Contiguous fp32 host matrices as C sees them; a vector is one row. The same ones come in every step."""

    def __init__(self, tensors: Sequence[Tensor], addresses: list[int]) -> None:
        self._tensors = tuple(tensors)  # which keeps them, and so their identities
        self._addresses = addresses
        # Of one number of rows, behind which nothing is read.
        alike = len({tuple(one.shape[:-1]) for one in tensors}) == 1
        self.readable = alike and _readable(tensors)
        self.number = len(addresses)
        self.rows = 1 if tensors[0].dim() == 1 else tensors[0].shape[0]
        widths = [one.shape[-1] for one in tensors]
        self.columns = sum(widths)
        self.addresses = (ADDRESS * self.number)(*addresses)
        self.widths = (LONG * self.number)(*widths)

    def are(self, tensors: Sequence[Tensor], addresses: list[int]) -> bool:
        """Whether these are still the same tensors, at the same place."""
        return (
            self._addresses == addresses
            and len(tensors) == self.number
            and all(map(operator.is_, self._tensors, tensors))
        )


class HistoryKernels(Native):
    """Rows and windows of amax histories."""

    _KEPT = 32

    def __init__(self, loaded: ctypes.CDLL, team: int | None = None) -> None:
        super().__init__(loaded, team)
        self._known_matrices: dict[int, _Matrices] = {}
        self._history_windows = self.bind(
            "history_windows", None, LONG, ADDRESS, ADDRESS, LONG, ADDRESS, ADDRESS, LONG, ADDRESS, ADDRESS
        )
        self._stacked_rows = self.bind("stacked_rows", None, LONG, ADDRESS, ADDRESS, LONG, ADDRESS)

    def stacked_rows(self, tensors: Sequence[Tensor], row: int) -> Tensor | None:
        """`telemetry.probes.delayed.stacked_rows`; None unless all are contiguous fp32 host tensors
        with that row.
        """
        found = self._matrices(tensors)
        if not found.readable or row >= found.rows:
            return None
        out = torch.empty(found.columns, dtype=torch.float32)
        self._stacked_rows(found.number, found.addresses, found.widths, row, out.data_ptr())
        return out

    def history_windows(
        self, histories: Sequence[Tensor], oldest: Tensor, last: Tensor, slots: Tensor
    ) -> Tensor | None:
        """`telemetry.probes.delayed.history_windows`; None unless all are contiguous fp32 host tensors, and
        the histories of one length.
        """
        found = self._matrices(histories)
        if not found.readable or not _readable((oldest, last)):
            return None
        count = slots.numel()
        out = torch.empty(count * found.rows, dtype=torch.float32)
        self._history_windows(
            found.number,
            found.addresses,
            found.widths,
            found.rows,
            oldest.data_ptr(),
            last.data_ptr(),
            count,
            slots.data_ptr(),
            out.data_ptr(),
        )
        return out

    def _matrices(self, tensors: Sequence[Tensor]) -> _Matrices:
        addresses = [one.data_ptr() for one in tensors]
        known = self._known_matrices.get(id(tensors[0]))
        if known is None or not known.are(tensors, addresses):
            if len(self._known_matrices) >= self._KEPT:
                self._known_matrices.clear()
            known = self._known_matrices[id(tensors[0])] = _Matrices(tensors, addresses)
        return known


def _readable(tensors: Sequence[Tensor]) -> bool:
    """Of other classes a FakeTensor, for one, has no memory."""
    return all(
        type(one) is Tensor
        and one.dtype == torch.float32
        and one.device.type == "cpu"
        and one.is_contiguous()
        for one in tensors
    )
