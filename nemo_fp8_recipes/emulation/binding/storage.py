"""Tensor storages: what every quantised format has in common.

A quantised tensor of TE is a bundle of buffers held as attributes (`_rowwise_data`, `_scale_inv`, …). A
`Layout` knows the buffers of one format; the functions here allocate them, adapt an existing tensor to a
quantizer, and write into it in place. In place matters: the distributed optimizer's shards are views of the
parameters' buffers.

Follows `Quantizer::create_tensor` and `::convert_and_update_tensor` in `pytorch/csrc/quantizer.cpp`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.binding.checks import nvte_check
from nemo_fp8_recipes.emulation.binding.overwrite import overwrite
from nemo_fp8_recipes.emulation.kernels import Quantized

__all__ = [
    "BufferSpec",
    "Buffers",
    "Layout",
    "adapt",
    "allocate",
    "direction_of",
    "flat_2d",
    "store",
    "transposed_shape",
]

SOURCE = "pytorch/csrc/quantizer.cpp"

Buffers = dict[str, Tensor]
"""Attribute name of the storage -> buffer; a buffer that is not kept is absent."""

BufferSpec = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a buffer."""


class Layout(Protocol):
    """The storage of one format, for one family of quantizers."""

    attributes: tuple[str, ...]
    """Every buffer that the storage can hold."""

    def specs(self, quantizer: Any, shape: Sequence[int]) -> dict[str, BufferSpec]:
        """The buffers that this quantizer keeps of a tensor of this shape.

        Raises:
            RuntimeError: a shape that the format cannot hold, in TE's words.
        """

    def shape_of(self, tensor: Any) -> tuple[int, ...]:
        """Logical shape of a tensor of this format, from the buffers that it has."""

    def encode(self, quantizer: Any, x: Tensor) -> Buffers:
        """Quantise a contiguous, non-empty tensor: the buffers that `specs` asks for."""

    def wrap(
        self,
        quantizer: Any,
        buffers: Mapping[str, Tensor],
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Any:
        """TE's tensor around the buffers: the storage class if the quantizer is internal, else the public."""

    def retag(self, quantizer: Any, tensor: Any) -> None:
        """Update what the tensor says of its buffers after the quantizer has filled them."""


def flat_2d(shape: Sequence[int]) -> tuple[int, int]:
    """A tensor as TE sees it: all dimensions but the last flattened. A scalar is 1 x 1."""
    if not shape:
        return (1, 1)
    return (math.prod(shape[:-1]), shape[-1])


def transposed_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of transposed data: the last dimension in front."""
    return (shape[-1], *shape[:-1]) if shape else ()


def allocate(
    layout: Layout, quantizer: Any, shape: Sequence[int], device: torch.device, *, zero_scales: bool = False
) -> Buffers:
    """Buffers with no defined content; with `zero_scales` those of scales are zero, as their padding is.

    An amax is always zero: that of an empty tensor is read, and nothing writes it.
    """
    return {
        name: (
            torch.zeros
            if name.startswith("_amax") or (zero_scales and name.endswith("_scale_inv"))
            else torch.empty
        )(spec_shape, dtype=spec_dtype, device=device)
        for name, (spec_shape, spec_dtype) in layout.specs(quantizer, shape).items()
    }


def direction_of(buffers: Mapping[str, Tensor], direction: str) -> Quantized | None:
    """Where the compiled kernels write the codes and scales of "rowwise" or "columnwise"; None where that
    direction is not kept.
    """
    codes = buffers.get(f"_{direction}_data")
    return None if codes is None else Quantized(codes, buffers[f"_{direction}_scale_inv"])


def adapt(layout: Layout, quantizer: Any, tensor: Any) -> tuple[int, ...]:
    """Give an existing tensor exactly the buffers that the quantizer keeps: missing ones are allocated,
    others dropped.

    Returns:
        The logical shape of the tensor.
    """
    shape = layout.shape_of(tensor)
    wanted = layout.specs(quantizer, shape)
    present = [name for name in layout.attributes if getattr(tensor, name) is not None]
    device = getattr(tensor, present[0]).device
    for name in layout.attributes:
        if name not in wanted and name in present:
            setattr(tensor, name, None)
        elif name in wanted and name not in present:
            spec_shape, spec_dtype = wanted[name]
            setattr(tensor, name, torch.empty(spec_shape, dtype=spec_dtype, device=device))
    return shape


def store(layout: Layout, quantizer: Any, buffers: Mapping[str, Tensor], tensor: Any) -> None:
    """Write quantised buffers into those of an existing tensor, in place."""
    for name, value in buffers.items():
        buffer = getattr(tensor, name)
        nvte_check(
            buffer.numel() == value.numel(),
            SOURCE,
            f"Expected {name.removeprefix('_')} with {value.numel()} elements, got {buffer.numel()}",
        )
        overwrite(buffer.detach(), value.view(buffer.shape))
    layout.retag(quantizer, tensor)
