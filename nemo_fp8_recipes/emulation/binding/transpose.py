"""Transposed copies.

Follows `pytorch/csrc/extensions/transpose.cpp` of Transformer Engine.
"""

# ruff: noqa: ARG001  # the element type is an argument of pybind's
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.binding.checks import nvte_check
from nemo_fp8_recipes.emulation.binding.storage import flat_2d, transposed_shape

__all__ = ["fp8_transpose", "swap_first_dims"]

SOURCE = "pytorch/csrc/extensions/transpose.cpp"


def fp8_transpose(input: Tensor, dtype: Any, *, out: Tensor | None) -> Tensor:
    """FP8 codes with the last dimension in front: uint8 [.., K] -> [K, ..], all dimensions but the last
    flattened.
    """
    result = out
    if result is None:
        result = torch.empty(transposed_shape(input.shape), dtype=torch.uint8, device=input.device)
    if input.numel() > 0:
        rows, columns = flat_2d(input.shape)
        result.view(columns, rows).copy_(input.reshape(rows, columns).t())
    return result


def swap_first_dims(tensor: Tensor, *, out: Tensor | None) -> Tensor:
    """A contiguous copy with the first two dimensions swapped."""
    nvte_check(tensor.dim() >= 2, SOURCE, "Invalid input tensor dimensions.")
    swapped = tensor.detach().transpose(0, 1)
    return swapped.contiguous() if out is None else out.copy_(swapped)
