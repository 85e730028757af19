"""What the storages of block-scaled formats (MXFP8, FP8 block scaling, NVFP4) have in common.

Each direction has codes and the scales of its blocks, padded with zeros to what a GEMM reads; a tensor has
one direction or both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.binding.checks import nvte_check
from nemo_fp8_recipes.emulation.binding.releases import release
from nemo_fp8_recipes.emulation.binding.storage import SOURCE

__all__ = ["ATTRIBUTES", "data_of", "pad_to", "round_up", "wrap"]

ATTRIBUTES = ("_rowwise_data", "_rowwise_scale_inv", "_columnwise_data", "_columnwise_scale_inv")
"""Codes and scales of both directions."""


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def pad_to(scale: Tensor, shape: Sequence[int]) -> Tensor:
    """Scales with zeros below and to the right."""
    rows, columns = shape
    return torch.nn.functional.pad(
        scale, (0, columns - scale.shape[1], 0, rows - scale.shape[0])
    ).contiguous()


def data_of(tensor: Any, storage: type, refusal: str, name: str) -> tuple[Any, Any]:
    """Codes of both directions, None for one that is not kept; one at least is there.

    Args:
        tensor: what is looked at.
        storage: TE's class for the format.
        refusal: what TE says of another class.
        name: what TE calls such a tensor.

    Raises:
        RuntimeError: another class, or a tensor without data, in TE's words.
    """
    nvte_check(isinstance(tensor, storage), SOURCE, refusal)
    rowwise, columnwise = tensor._rowwise_data, tensor._columnwise_data
    nvte_check(rowwise is not None or columnwise is not None, SOURCE, f"{name} has no data.")
    return rowwise, columnwise


def wrap(
    quantizer: Any,
    buffers: Mapping[str, Tensor],
    attributes: Sequence[str],
    fields: Mapping[str, Any],
    classes: tuple[Any, Any],
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """TE's tensor around the buffers.

    Args:
        quantizer: what made them.
        buffers: those that are kept.
        attributes: all that the format knows.
        fields: what else the tensor says of itself.
        classes: TE's storage, for internal quantizers, and its public tensor.
        shape, dtype, device: of the tensor that it stands for.
    """
    storage, public = classes
    arguments = {name[1:]: buffers.get(name) for name in attributes} | {"quantizer": quantizer, **fields}
    if quantizer.internal:
        return storage(**release().constructor(arguments | {"fake_dtype": dtype}))
    arguments |= {"shape": tuple(shape), "dtype": dtype, "device": device}
    return public(**release().constructor(arguments))
