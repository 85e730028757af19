"""The values that a quantised tensor of Transformer Engine stands for, from its rowwise codes and scales.

Attributes and layouts are those of `transformer_engine/pytorch/tensor/storage/*_tensor_storage.py`; the
layouts of the scales stand in `probes/blocks.py`. Transformer Engine's own `dequantize` refuses scales that
were already arranged for the GEMM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_fp8_recipes.numerics import FORMATS, blockwise, mxfp8, nvfp4, tensorwise
from nemo_fp8_recipes.numerics.blocks import dequantize_blocks
from nemo_fp8_recipes.numerics.cast import decode
from nemo_fp8_recipes.numerics.formats import E4M3
from nemo_fp8_recipes.numerics.fp4 import E2M1_MAX
from nemo_fp8_recipes.telemetry.probes.base import element_format
from nemo_fp8_recipes.telemetry.probes.blocks import unpadded_positions
from nemo_fp8_recipes.telemetry.probes.index import IndexCache

__all__ = ["Stored", "per_block_limit", "stored"]


class Stored(NamedTuple):
    """What a quantised tensor stands for.

    Attributes:
        values: fp32 (rows, columns), the leading dimensions of the tensor flattened.
        limit: fp32, broadcastable to it: the largest magnitude that a code stands for.
    """

    values: Tensor
    limit: Tensor


def stored(quantizer: Any, tensor: Any, indices: IndexCache) -> Stored | None:
    """Values of `tensor`, which `quantizer` made; None where it has no rowwise codes, or unknown ones."""
    reader = _READERS.get(type(quantizer).__name__)
    return reader(quantizer, tensor, indices) if reader is not None else None


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
    limit = (scale_inv * largest).repeat_interleave(columns, dim=1)[:, : shape[1]]
    return limit.repeat_interleave(rows, dim=0)[: shape[0]] if rows > 1 else limit


def _per_tensor(quantizer: Any, tensor: Any, _: IndexCache) -> Stored | None:
    fmt = FORMATS[element_format(quantizer)]
    if tensor._data is not None:
        codes = _matrix(tensor._data)
    elif tensor._transpose is not None and not tensor._transpose_invalid:
        codes = tensor._transpose.reshape(tensor._transpose.shape[0], -1).t()
    else:
        return None
    scale_inv = tensor._scale_inv.detach().reshape(())
    return Stored(tensorwise.dequantize(codes, scale_inv, fmt), scale_inv * fmt.max)


def _blockwise(quantizer: Any, tensor: Any, _: IndexCache) -> Stored | None:
    if tensor._rowwise_data is None:
        return None
    fmt = FORMATS[element_format(quantizer)]
    codes, scale_inv = _matrix(tensor._rowwise_data), tensor._rowwise_scale_inv.detach()
    m, k = codes.shape
    if quantizer.block_scaling_dim == 2:
        block = (blockwise.BLOCK, blockwise.BLOCK)
        scale_inv = scale_inv[: -(-m // block[0]), : -(-k // block[1])]
    else:
        block = (1, blockwise.BLOCK)
        scale_inv = scale_inv[:, :m].t()
    return Stored(
        dequantize_blocks(codes, scale_inv, fmt, block),
        per_block_limit(scale_inv, fmt.max, block, codes.shape),
    )


def _mxfp8(quantizer: Any, tensor: Any, indices: IndexCache) -> Stored | None:
    if tensor._rowwise_data is None:
        return None
    fmt = FORMATS[element_format(quantizer)]
    codes = _matrix(tensor._rowwise_data)
    block = (1, mxfp8.BLOCK)
    scale_inv = mxfp8.e8m0_to_fp32(_rowwise_scales(tensor, codes.shape[0], -(-codes.shape[1] // 32), indices))
    return Stored(
        dequantize_blocks(codes, scale_inv, fmt, block),
        per_block_limit(scale_inv, fmt.max, block, codes.shape),
    )


def _nvfp4(_: Any, tensor: Any, indices: IndexCache) -> Stored | None:
    if tensor._rowwise_data is None or getattr(tensor, "_nvfp4_use_4over6", False):
        return None  # 4over6 blocks have a rule of their own
    packed = _matrix(tensor._rowwise_data)
    codes = _rowwise_scales(tensor, packed.shape[0], -(-packed.shape[1] // 8), indices)
    amax = tensor._amax_rowwise.detach()
    values = nvfp4.dequantize(packed, codes, amax)
    scale_inv = decode(codes, E4M3).mul_(amax.reshape(-1, 1)).mul_(1.0 / (E4M3.max * E2M1_MAX))
    return Stored(values, per_block_limit(scale_inv, E2M1_MAX, (1, nvfp4.BLOCK), values.shape))


def _rowwise_scales(tensor: Any, rows: int, columns: int, indices: IndexCache) -> Tensor:
    """uint8 (rows, columns): the rowwise block scales without padding, in the order of the blocks."""
    scale: Tensor = tensor._rowwise_scale_inv.detach()
    if not getattr(tensor, "_with_gemm_swizzled_scales", False):
        return scale[:rows, :columns]
    positions = unpadded_positions(rows, columns, *scale.shape, "rowwise")
    return scale.reshape(-1).index_select(0, indices.on(scale.device, positions)).view(rows, columns)


def _matrix(data: Tensor) -> Tensor:
    data = data.detach().view(torch.uint8)
    return data.reshape(-1, data.shape[-1])


_READERS: dict[str, Callable[[Any, Any, IndexCache], Stored | None]] = {
    "Float8Quantizer": _per_tensor,
    "Float8CurrentScalingQuantizer": _per_tensor,
    "Float8BlockQuantizer": _blockwise,
    "MXFP8Quantizer": _mxfp8,
    "NVFP4Quantizer": _nvfp4,
}
