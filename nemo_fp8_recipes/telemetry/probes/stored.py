"""What a quantised tensor of Transformer Engine holds, and the values that it stands for.

Attributes and layouts are those of `transformer_engine/pytorch/tensor/storage/*_tensor_storage.py`; the
layouts of the scales stand in `probes/blocks.py`. Transformer Engine's own `dequantize` refuses scales that
were already arranged for the GEMM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_fp8_recipes.numerics import FORMATS, blockwise, mxfp8, nvfp4
from nemo_fp8_recipes.numerics.blocks import dequantize_blocks
from nemo_fp8_recipes.numerics.cast import decode
from nemo_fp8_recipes.numerics.formats import E4M3
from nemo_fp8_recipes.numerics.fp4 import E2M1_MAX
from nemo_fp8_recipes.numerics.tensorwise import dequantize
from nemo_fp8_recipes.telemetry.coded import Coded
from nemo_fp8_recipes.telemetry.groups import OneMatrix
from nemo_fp8_recipes.telemetry.probes.base import element_format
from nemo_fp8_recipes.telemetry.probes.blocks import unpadded_positions
from nemo_fp8_recipes.telemetry.probes.index import IndexCache

__all__ = ["Stored", "in_order", "per_block_limit", "scale_inverses", "stored", "values"]


class Stored(NamedTuple):
    """What a quantised tensor stands for.

    Attributes:
        values: fp32 (rows, columns), the leading dimensions of the tensor flattened.
        limit: fp32, broadcastable to it: the largest magnitude that a code stands for.
    """

    values: Tensor
    limit: Tensor


def stored(quantizer: Any, tensor: Any) -> Coded | None:
    """What is stored of `tensor`, which `quantizer` made: rowwise, or columnwise where that is all there is.

    Returns:
        None where it is nothing that can be compared with the tensor itself: NVFP4's columnwise data is that
        of its Hadamard transform, and its 4over6 blocks have a rule of their own.
    """
    reader = _READERS.get(type(quantizer).__name__)
    if isinstance(tensor, OneMatrix):
        tensor = tensor.with_values()
    return reader(quantizer, tensor) if reader is not None else None


def values(coded: Coded, indices: IndexCache) -> Stored:
    """The values of the codes, in torch operations that wait for nothing."""
    coded = in_order(coded, indices)
    scale_inv = scale_inverses(coded.scales, coded.amax)
    if coded.amax is not None:
        found = nvfp4.dequantize(coded.codes, coded.scales, coded.amax)
        return Stored(found, per_block_limit(scale_inv, E2M1_MAX, coded.block, found.shape))
    fmt = FORMATS[coded.format]
    if coded.block == coded.shape:
        return Stored(dequantize(coded.codes, scale_inv, fmt), scale_inv * fmt.max)
    return Stored(
        dequantize_blocks(coded.codes, scale_inv, fmt, coded.block),
        per_block_limit(scale_inv, fmt.max, coded.block, coded.codes.shape),
    )


def in_order(coded: Coded, indices: IndexCache) -> Coded:
    """The same with one scale for each block, in the order of the blocks."""
    if not coded.swizzle:
        return coded
    rows, columns = coded.shape
    down, across = -(-rows // coded.block[0]), -(-columns // coded.block[1])
    positions = unpadded_positions(down, across, *coded.scales.shape, coded.swizzle)
    picked = coded.scales.reshape(-1).index_select(0, indices.on(coded.scales.device, positions))
    return coded._replace(scales=picked.view(down, across), swizzle="")


def scale_inverses(scales: Tensor, amax: Tensor | None) -> Tensor:
    """What codes are multiplied with, fp32 of the shape of `scales`.

    Args:
        scales: as `Coded.scales`, in the order of the blocks.
        amax: as `Coded.amax`.
    """
    if amax is not None:
        return decode(scales, E4M3).mul_(amax.reshape(-1, 1)).mul_(1.0 / (E4M3.max * E2M1_MAX))
    return mxfp8.e8m0_to_fp32(scales) if scales.dtype == torch.uint8 else scales


def per_block_limit(scale_inv: Tensor, largest: float, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """largest x scale_inv of each element's block.

    Args:
        scale_inv: fp32 (ceil(rows / block rows), ceil(columns / block columns)).
        block: rows and columns of a block.
        shape: (rows, columns).

    Returns:
        fp32 of `shape`.
    """
    rows, columns = block
    limit = scale_inv * largest
    if columns > 1:
        limit = limit.repeat_interleave(columns, dim=1)[:, : shape[1]]
    return limit.repeat_interleave(rows, dim=0)[: shape[0]] if rows > 1 else limit


def _per_tensor(quantizer: Any, tensor: Any) -> Coded | None:
    rowwise = tensor._data is not None
    if rowwise:
        codes = _matrix(tensor._data)
    elif tensor._transpose is not None and not tensor._transpose_invalid:
        codes = _transposed(tensor._transpose)
    else:
        return None
    scale_inv = tensor._scale_inv.reshape(-1, 1)  # one, or one a row
    block = (codes.shape[0] // scale_inv.shape[0], codes.shape[1])
    return Coded(codes, scale_inv, element_format(quantizer), block, rowwise=rowwise)


def _blockwise(quantizer: Any, tensor: Any) -> Coded | None:
    rowwise = tensor._rowwise_data is not None
    if rowwise:
        codes, scale_inv = _matrix(tensor._rowwise_data), tensor._rowwise_scale_inv
    elif tensor._columnwise_data is not None:
        codes, scale_inv = _transposed(tensor._columnwise_data), tensor._columnwise_scale_inv
    else:
        return None
    square = quantizer.block_scaling_dim == 2
    block = tuple(blockwise.BLOCK if square or along else 1 for along in (not rowwise, rowwise))
    if square != rowwise:
        scale_inv = scale_inv.t()
    rows, columns = codes.shape
    scale_inv = scale_inv[: -(-rows // block[0]), : -(-columns // block[1])]
    return Coded(codes, scale_inv, element_format(quantizer), (block[0], block[1]), rowwise=rowwise)


def _mxfp8(quantizer: Any, tensor: Any) -> Coded | None:
    rowwise = tensor._rowwise_data is not None
    if rowwise:
        codes, scales, block = tensor._rowwise_data, tensor._rowwise_scale_inv, (1, mxfp8.BLOCK)
    elif tensor._columnwise_data is not None:
        codes, scales, block = tensor._columnwise_data, tensor._columnwise_scale_inv, (mxfp8.BLOCK, 1)
    else:
        return None
    return _arranged(tensor, Coded(_matrix(codes), scales, element_format(quantizer), block, rowwise=rowwise))


def _nvfp4(_: Any, tensor: Any) -> Coded | None:
    if tensor._rowwise_data is None or getattr(tensor, "_nvfp4_use_4over6", False):
        return None
    packed, scales = _matrix(tensor._rowwise_data), tensor._rowwise_scale_inv
    amax = tensor._amax_rowwise
    return _arranged(tensor, Coded(packed, scales, "e2m1", (1, nvfp4.BLOCK), amax=amax))


def _arranged(tensor: Any, coded: Coded) -> Coded:
    """With its scales without padding, or marked as being in the GEMM's order."""
    if getattr(tensor, "_with_gemm_swizzled_scales", False):
        return coded._replace(swizzle="rowwise" if coded.rowwise else "columnwise")
    rows, columns = coded.shape
    used = (-(-rows // coded.block[0]), -(-columns // coded.block[1]))
    if coded.scales.shape == used:
        return coded
    return coded._replace(scales=coded.scales[: used[0], : used[1]])


def _matrix(data: Tensor) -> Tensor:
    # Every operation takes as long as a few thousand elements do.
    if data.dtype != torch.uint8:
        data = data.view(torch.uint8)
    return data if data.dim() == 2 else data.reshape(-1, data.shape[-1])


def _transposed(data: Tensor) -> Tensor:
    """The matrix of data that is stored transposed: the last dimension first."""
    data = data.view(torch.uint8)
    return data.reshape(data.shape[0], -1).t()


_READERS: dict[str, Callable[[Any, Any], Coded | None]] = {
    "Float8Quantizer": _per_tensor,
    "Float8CurrentScalingQuantizer": _per_tensor,
    "Float8BlockQuantizer": _blockwise,
    "MXFP8Quantizer": _mxfp8,
    "NVFP4Quantizer": _nvfp4,
}
