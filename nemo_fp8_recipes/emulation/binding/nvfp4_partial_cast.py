"""NVFP4 primary weights: quantising the shard of a weight that one rank owns, and what is made of the whole.

As in `partial_cast.py`: amaxes of a rank's piece of every 16x16 block, reduced over ranks; the scales of the
blocks; the piece's codes, two a byte. Columnwise data is the transposed rowwise data.

Follows `pytorch/csrc/extensions/nvfp4_2d_partial_cast.cpp`, `pytorch/csrc/extensions/transpose.cpp` and
`common/recipe/nvfp4.cu` of Transformer Engine.
"""

# ruff: noqa: ARG001  # signatures are pybind's
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.binding.checks import nvte_check
from nemo_fp8_recipes.emulation.binding.partial_cast import in_place_of_whole, positions
from nemo_fp8_recipes.emulation.binding.per_tensor import amax_of
from nemo_fp8_recipes.numerics import fp4
from nemo_fp8_recipes.numerics.blocks import block_amax
from nemo_fp8_recipes.numerics.cast import decode, saturating_cast
from nemo_fp8_recipes.numerics.formats import E4M3
from nemo_fp8_recipes.numerics.nvfp4 import BLOCK
from nemo_fp8_recipes.numerics.scale import FLT_MAX

__all__ = [
    "nvfp4_2d_compute_partial_amax",
    "nvfp4_2d_multi_tensor_transpose",
    "nvfp4_2d_partial_cast",
    "nvfp4_2d_scale_transpose",
    "nvfp4_compute_global_scale",
    "nvfp4_compute_per_block_scale",
    "nvfp4_data_transpose",
    "nvfp4_expand_scale_to_fp8",
    "nvfp4_fused_scale",
    "nvfp4_multi_tensor_2d_partial_cast",
    "nvfp4_multi_tensor_compute_partial_amax",
    "nvfp4_multi_tensor_fused_scale",
]

SOURCE = "pytorch/csrc/extensions/nvfp4_2d_partial_cast.cpp"
TRANSPOSE = "pytorch/csrc/extensions/transpose.cpp"
_WHOLE_RANGE = E4M3.max * fp4.E2M1_MAX
_TINY = torch.finfo(torch.float32).tiny


def _check_block(block_len: int) -> None:
    nvte_check(block_len == BLOCK, SOURCE, "Currently only block_len = 16 is supported for NVFP4 2D")


def nvfp4_2d_compute_partial_amax(
    tensor: Tensor, amax: Tensor, h: int, w: int, start_offset: int, block_len: int = BLOCK
) -> None:
    """Amax of the piece in every 16x16 block of the [h, w] weight, into `amax` fp32 [h / 16, w / 16]."""
    _check_block(block_len)
    nvte_check(amax.dim() == 2, SOURCE, "amax must be a 2D tensor")
    nvte_check(amax.dtype == torch.float32, SOURCE, "amax must be a float tensor")
    _check_piece(tensor, "tensor")
    found = block_amax(in_place_of_whole(tensor, h, w, start_offset), (BLOCK, BLOCK))
    amax[: found.shape[0], : found.shape[1]].copy_(found)


def _check_piece(piece: Tensor, name: str) -> None:
    nvte_check(
        piece.dtype in (torch.float32, torch.bfloat16), SOURCE, f"{name} must be a float or bfloat16 tensor"
    )


def nvfp4_multi_tensor_compute_partial_amax(
    master_weight_list: Sequence[Tensor],
    partial_amax_list: Sequence[Tensor],
    global_amax_list: Sequence[Tensor],
    h_list: Sequence[int],
    w_list: Sequence[int],
    start_offset_list: Sequence[int],
    block_len: int = BLOCK,
) -> None:
    """The same for many pieces, and the amax of each whole piece."""
    everything = zip(
        master_weight_list,
        partial_amax_list,
        global_amax_list,
        h_list,
        w_list,
        start_offset_list,
        strict=True,
    )
    for piece, amax, largest, h, w, start in everything:
        nvte_check(largest.numel() == 1, SOURCE, "global_amax must have exactly one element")
        nvfp4_2d_compute_partial_amax(piece, amax, h, w, start, block_len)
        largest.copy_(amax_of(piece.detach()).reshape(largest.shape))


def _global_scale(amax: Tensor) -> Tensor:
    """What maps an amax to 448 * 6; 1 for an amax of zero."""
    scale = torch.div(torch.full_like(amax, _WHOLE_RANGE), amax.clamp_min(_TINY)).clamp_max(FLT_MAX)
    return torch.where(amax > 0.0, scale, 1.0)


def nvfp4_compute_global_scale(global_amax: Tensor, global_scale: Tensor) -> None:
    """448 * 6 / amax, into `global_scale`; fp32."""
    global_scale.copy_(_global_scale(global_amax.detach()))


def nvfp4_compute_per_block_scale(block_amax: Tensor, scale: Tensor, global_amax: Tensor) -> None:
    """Block amax * (global scale / 6), not yet rounded to E4M3, into `scale`; fp32."""
    nvte_check(global_amax.numel() == 1, TRANSPOSE, "Global amax must be a single element tensor.")
    sixth = torch.tensor(1.0 / fp4.E2M1_MAX, dtype=torch.float32)
    factor = _global_scale(global_amax.detach().reshape(())) * sixth
    scale.copy_((block_amax.detach() * factor).clamp_max(FLT_MAX))


def nvfp4_expand_scale_to_fp8(
    input: Tensor, output: Tensor, tile_rows: int, tile_cols: int, rows_padded: int, block_len: int
) -> None:
    """E4M3 codes of the blocks' scales, one for every row of a block, zero below; into `output`
    [rows_padded, tile_cols].
    """
    codes = saturating_cast(input.detach().view(tile_rows, tile_cols), E4M3).repeat_interleave(
        block_len, dim=0
    )
    expanded = torch.zeros(rows_padded, tile_cols, dtype=torch.uint8)
    rows = min(rows_padded, len(codes))
    expanded[:rows] = codes[:rows]
    output.detach().reshape(-1)[: expanded.numel()].copy_(expanded.view(-1))


def nvfp4_fused_scale(
    block_amax: Tensor,
    global_amax: Tensor,
    per_block_scale: Tensor,
    target_scale: Tensor,
    target_amax: Tensor,
    tile_rows: int,
    tile_cols: int,
    rows_padded: int,
    block_len: int,
) -> None:
    """Scales of the blocks in fp32 and as codes for every row, and the amax for the tensor."""
    target_amax.copy_(global_amax.reshape(target_amax.shape))
    nvfp4_compute_per_block_scale(block_amax, per_block_scale, global_amax)
    nvfp4_expand_scale_to_fp8(per_block_scale, target_scale, tile_rows, tile_cols, rows_padded, block_len)


def nvfp4_multi_tensor_fused_scale(
    block_amax_list: Sequence[Tensor],
    global_amax_list: Sequence[Tensor],
    per_block_scale_list: Sequence[Tensor],
    target_scale_list: Sequence[Tensor],
    target_amax_list: Sequence[Tensor],
    tile_rows_list: Sequence[int],
    tile_cols_list: Sequence[int],
    rows_padded_list: Sequence[int],
    block_len: int,
) -> None:
    tensors = zip(
        block_amax_list,
        global_amax_list,
        per_block_scale_list,
        target_scale_list,
        target_amax_list,
        strict=True,
    )
    sizes = zip(tile_rows_list, tile_cols_list, rows_padded_list, strict=True)
    for (found, whole, scale, codes, amax), (rows, columns, padded) in zip(tensors, sizes, strict=True):
        nvfp4_fused_scale(found, whole, scale, codes, amax, rows, columns, padded, block_len)


def nvfp4_2d_partial_cast(
    inp: Tensor,
    out: Any,
    scale: Tensor,
    global_scale: Tensor,
    h: int,
    w: int,
    start_offset: int,
    block_len: int = BLOCK,
) -> None:
    """Cast a piece with the scales fp32 [h / 16, w / 16] of its blocks into the bytes `out`, from that on
    which holds the piece's first element; codes of the same byte that are not of the piece stay.
    """
    _check_block(block_len)
    nvte_check(scale.dim() == 2, SOURCE, "scale must be a 2D tensor")
    nvte_check(scale.dtype == torch.float32, SOURCE, "scale must be a float tensor")
    nvte_check(global_scale.numel() == 1, SOURCE, "global_scale must be a scalar tensor")
    _check_piece(inp, "input")
    values = inp.detach().reshape(-1).to(torch.float32)
    rows, columns = positions(values.numel(), w, start_offset, values.device)
    whole = global_scale.detach().reshape(())
    inverse = 1.0 / torch.where(whole > 0.0, whole, 1.0)
    block = decode(saturating_cast(scale.detach(), E4M3), E4M3)
    factors = torch.where(block > 0.0, 1.0 / (block * inverse), FLT_MAX).clamp_max(FLT_MAX)
    codes = fp4.encode(values * factors[rows // BLOCK, columns // BLOCK])
    # A pair of codes lies in the byte that its first code in the piece has.
    index = torch.arange(start_offset, start_offset + values.numel())
    first = torch.maximum(index - index % 2, torch.tensor(start_offset))
    place = (first - start_offset) // 2
    packed = out.detach().reshape(-1)
    for odd, kept, shift in ((0, 0xF0, 0), (1, 0x0F, 4)):
        chosen = index % 2 == odd
        packed[place[chosen]] = (packed[place[chosen]] & kept) | (codes[chosen] << shift)


def nvfp4_multi_tensor_2d_partial_cast(
    inp_list: Sequence[Tensor],
    out_list: Sequence[Tensor],
    scale_list: Sequence[Tensor],
    global_scale_list: Sequence[Tensor],
    h_list: Sequence[int],
    w_list: Sequence[int],
    start_offset_list: Sequence[int],
    block_len: int = BLOCK,
) -> None:
    tensors = zip(inp_list, out_list, scale_list, global_scale_list, strict=True)
    sizes = zip(h_list, w_list, start_offset_list, strict=True)
    for (piece, out, scale, whole), (h, w, start) in zip(tensors, sizes, strict=True):
        nvfp4_2d_partial_cast(piece, out, scale, whole, h, w, start, block_len)


def nvfp4_data_transpose(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Packed codes [K, M / 2] of the transposed matrix, from [M, K / 2]."""
    nvte_check(input.dim() == 2, TRANSPOSE, "NVFP4 transpose expects 2D input (packed storage).")
    rows = input.shape[0]
    nvte_check(rows % 2 == 0, TRANSPOSE, f"NVFP4 transpose requires M ({rows}) to be even.")
    packed = input.detach()
    codes = torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(1).t()
    turned = codes[:, 0::2] | (codes[:, 1::2] << 4)
    if out is None:
        return turned.contiguous()
    nvte_check(out.shape == turned.shape, TRANSPOSE, "Output shape mismatch for NVFP4 transpose.")
    out.detach().copy_(turned)
    return out


def nvfp4_2d_scale_transpose(input: Tensor, output: Tensor, M_tiles: int, K_tiles: int) -> None:
    """Scales of the transposed matrix: those of its 16x16 blocks, 16 times each, zero below; into the first
    columns of `output` [K padded, >= M / 16], from [M padded, >= K / 16].
    """
    for scales, name in ((input, "input"), (output, "output")):
        nvte_check(scales.dim() == 2, TRANSPOSE, f"NVFP4 scale transpose expects 2D {name}.")
        nvte_check(
            scales.dtype == torch.uint8, TRANSPOSE, f"NVFP4 scale transpose {name} must be uint8 (E4M3)."
        )
    tiles = input.detach()[: M_tiles * BLOCK : BLOCK, :K_tiles]
    turned = tiles.t().repeat_interleave(BLOCK, dim=0)[: output.shape[0]]
    target = output.detach()[:, :M_tiles]
    target.zero_()
    target[: len(turned)].copy_(turned)


def nvfp4_2d_multi_tensor_transpose(
    rowwise_data_list: Sequence[Tensor],
    columnwise_data_list: Sequence[Tensor],
    rowwise_scale_inv_list: Sequence[Tensor],
    columnwise_scale_inv_list: Sequence[Tensor],
    M_list: Sequence[int],
    K_list: Sequence[int],
) -> None:
    """Columnwise data and scales of many tensors, into buffers that exist."""
    for rowwise, columnwise, row_scale, column_scale, m, k in zip(
        rowwise_data_list,
        columnwise_data_list,
        rowwise_scale_inv_list,
        columnwise_scale_inv_list,
        M_list,
        K_list,
        strict=True,
    ):
        nvfp4_data_transpose(rowwise.reshape(m, k // 2), out=columnwise)
        nvfp4_2d_scale_transpose(row_scale, column_scale, -(-m // BLOCK), -(-k // BLOCK))
