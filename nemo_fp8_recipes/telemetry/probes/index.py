"""Index tensors on the device, uploaded once: the same modules run in the same order in every step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["IndexCache"]

_MAX_ENTRIES = 64


class IndexCache:
    """int64 index tensors by content. A logging step that looks like an earlier one uploads nothing."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[torch.device, Hashable], Tensor] = {}

    def on(self, device: torch.device, index: Sequence[int] | np.ndarray) -> Tensor:
        """`index` as an int64 tensor on `device`."""
        array = np.ascontiguousarray(index, dtype=np.int64)
        return self.made(device, array.tobytes(), lambda: array)

    def made(self, device: torch.device, key: Hashable, make: Callable[[], np.ndarray]) -> Tensor:
        """What `make` returns as an int64 tensor on `device`; `key` says all that it depends on."""
        tensor = self._tensors.get((device, key))
        if tensor is None:
            if len(self._tensors) >= _MAX_ENTRIES:
                self._tensors.clear()
            array = np.array(make(), dtype=np.int64)  # a copy
            tensor = self._tensors[device, key] = torch.from_numpy(array).to(device, non_blocking=True)
        return tensor
