"""What telemetry reads of delayed scaling's amax histories, for all modules at once."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.kernels.native import ADDRESS, LONG, Native

__all__ = ["HistoryKernels"]


class HistoryKernels(Native):
    """Windows of amax histories."""

    def __init__(self, loaded: ctypes.CDLL, team: int | None = None) -> None:
        super().__init__(loaded, team)
        self._history_windows = self.bind(
            "history_windows", None, LONG, ADDRESS, ADDRESS, LONG, ADDRESS, ADDRESS, LONG, ADDRESS, ADDRESS
        )

    def history_windows(
        self, histories: Sequence[Tensor], oldest: Tensor, last: Tensor, slots: Tensor
    ) -> Tensor | None:
        """`telemetry.probes.delayed.history_windows`; None unless all are contiguous fp32 host tensors."""
        for one in (*histories, oldest, last):
            if one.dtype != torch.float32 or one.device.type != "cpu" or not one.is_contiguous():
                return None
        number = len(histories)
        shapes = [one.shape for one in histories]
        length, count = shapes[0][0], slots.numel()
        out = torch.empty(count * length, dtype=torch.float32)
        self._history_windows(
            number,
            (ADDRESS * number)(*[one.data_ptr() for one in histories]),
            (LONG * number)(*[shape[1] for shape in shapes]),
            length,
            oldest.data_ptr(),
            last.data_ptr(),
            count,
            slots.data_ptr(),
            out.data_ptr(),
        )
        return out
