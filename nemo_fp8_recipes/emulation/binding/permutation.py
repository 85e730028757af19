"""Sorting tokens by their experts, and back.

Follows `pytorch/csrc/extensions/permutation.cpp` and `common/permutation/permutation.cu` of Transformer
Engine: the functions behind `moe_permute(map_type="index")`. Sums are in the dtype of the tokens (fp16 for
FP8), rounded after every step; a factor and a sum are rounded one after the other.
"""

# ruff: noqa: ARG001  # workspaces are pybind's arguments
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.binding.checks import nvte_error
from nemo_fp8_recipes.emulation.binding.dtypes import fp8_format
from nemo_fp8_recipes.emulation.binding.releases import release

__all__ = ["moe_permute_bwd", "moe_permute_fwd", "moe_unpermute_bwd", "moe_unpermute_fwd"]

_FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_CODES = 7
_MOST_EXPERTS = 128


def moe_permute_fwd(
    input: Tensor,
    dtype: Any,
    indices: Tensor,
    num_out_tokens: int,
    workspace: list[Tensor],
    max_expanded_token_num: int,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Rows in the order of their experts.

    Args:
        input: [tokens, columns]; uint8 codes where `dtype` is an FP8 type.
        indices: int32 [tokens, experts of each], the expert of each copy.
        num_out_tokens: rows that are kept of the sorted ones; 0: all.

    Returns:
        [rows, columns], int32 [experts of each * tokens] with the row of every copy or -1, and the workspace.
    """
    tokens, each = indices.shape
    keys = indices.detach().reshape(-1).to(torch.int64)
    if release().permute_sorts_unsigned:
        keys = torch.where(keys < 0, keys + 2**32, keys)
    order = torch.argsort(keys, stable=True)
    kept = num_out_tokens if num_out_tokens > 0 else tokens * each
    place = torch.arange(tokens * each, dtype=torch.int32)
    place[kept:] = -1
    rows = torch.empty(tokens * each, dtype=torch.int32)
    rows[(order % each) * tokens + order // each] = place
    out = torch.empty((kept, input.shape[1]), dtype=input.dtype)
    out[: order[:kept].numel()] = input.detach()[order[:kept] // each]
    return out, rows, workspace


def moe_permute_bwd(
    input: Tensor, dtype: Any, row_id_map: Tensor, prob: Tensor, num_tokens: int, topK: int
) -> Tensor:
    return moe_unpermute_fwd(input, dtype, row_id_map, prob, num_tokens, topK)


def moe_unpermute_fwd(
    input: Tensor, dtype: Any, row_id_map: Tensor, prob: Tensor, num_tokens: int, topK: int
) -> Tensor:
    """Sum of the rows that a token became, each times its probability; [tokens, columns]."""
    values = _values(input, dtype)
    rows = row_id_map.view(topK, num_tokens).long()
    total = values.new_zeros((num_tokens, input.shape[1]))
    for choice in range(topK):
        there = (rows[choice] >= 0)[:, None]
        part = values[rows[choice].clamp_min(0)]
        if prob.numel():
            part = part * prob.detach()[:, choice, None].to(values.dtype)
        total = torch.where(there, total + part, total) if choice else torch.where(there, part, total)
    if _is_fp8(dtype) and not prob.numel():
        total = total / topK
    return _stored(total, dtype, input.dtype)


def moe_unpermute_bwd(
    input_bwd: Tensor, input_fwd: Tensor, dtype: Any, row_id_map: Tensor, prob: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows [rows, columns] and of the probabilities, fp32 [tokens, experts of each]."""
    with_prob = prob.numel() > 0
    tokens, each = prob.shape if with_prob else (row_id_map.shape[0], 1)
    if each > _MOST_EXPERTS:
        nvte_error("common/permutation/permutation.cu", "topK cannot exceed 128.")
    grad = _values(input_bwd, dtype)
    rows = row_id_map.view(each, tokens).long()
    act_grad = torch.empty((input_fwd.shape[0], input_bwd.shape[1]), dtype=input_bwd.dtype)
    prob_grad = torch.zeros((tokens, each), dtype=torch.float32)
    forward = _values(input_fwd, dtype) if with_prob else None
    for choice in range(each):
        there = rows[choice] >= 0
        target, source = rows[choice][there], grad[there]
        if forward is None:
            act_grad[target] = _stored(source, dtype, input_bwd.dtype)
            continue
        factor = prob.detach()[there, choice, None].to(grad.dtype)
        act_grad[target] = _stored(source * factor, dtype, input_bwd.dtype)
        prob_grad[there, choice] = (source * forward[target]).to(torch.float32).sum(dim=1)
    return act_grad, prob_grad


def _is_fp8(dtype: Any) -> bool:
    return int(dtype) in (_CODES, _CODES + 1)


def _values(x: Tensor, dtype: Any) -> Tensor:
    """In the dtype in which the kernel computes."""
    x = x.detach()
    if not _is_fp8(dtype):
        return x
    return x.view(_FP8[fp8_format(dtype).name]).to(torch.float16)


def _stored(x: Tensor, dtype: Any, stored_as: torch.dtype) -> Tensor:
    if not _is_fp8(dtype):
        return x
    fmt = fp8_format(dtype)
    codes = x.to(torch.float32).clamp(-fmt.max, fmt.max).to(_FP8[fmt.name])
    return codes.view(torch.uint8).view(stored_as)
