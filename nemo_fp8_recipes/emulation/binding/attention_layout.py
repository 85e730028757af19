"""Layouts of what attention reads: tensors in another order of dimensions, padded, packed or cached.

Follows `pytorch/csrc/extensions/attention.cpp`, `common/fused_attn/flash_attn.cu` and
`common/fused_attn/kv_cache.cu` of Transformer Engine. Nothing is computed: values are moved.
"""

# ruff: noqa: ARG001  # signatures are pybind's
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from nemo_fp8_recipes.emulation.binding.checks import nvte_check

__all__ = [
    "convert_bshd_to_thd",
    "convert_thd_to_bshd",
    "copy_to_kv_cache",
    "fa_prepare_bwd",
    "fa_prepare_fwd",
    "multi_tensor_pad_last_dim",
    "multi_tensor_transpose_to_bhsd",
]

SOURCE = "pytorch/csrc/extensions/attention.cpp"
_HALF = (torch.float16, torch.bfloat16)
_SBHD, _BSHD, _THD = 0, 1, 2
_HEAD = 128  # what a warp of the FlashAttention kernels loads at once


def multi_tensor_transpose_to_bhsd(
    inputs: Sequence[Tensor | None], original_format: str, outputs: Sequence[Tensor | None] = ()
) -> list[Tensor | None]:
    """[b, h, s, d] of each; zeros behind d where an output is wider."""
    name = "multi_tensor_transpose_to_bhsd"
    nvte_check(
        original_format in ("sbhd", "bshd"),
        SOURCE,
        f"{name}: only BSHD/SBHD -> BHSD is currently supported. Got original_format={original_format!r}.",
    )
    nvte_check(
        not outputs or len(outputs) == len(inputs),
        SOURCE,
        f"{name}: outputs.size() ({len(outputs)}) != inputs.size() ({len(inputs)}).",
    )
    order = (1, 2, 0, 3) if original_format == "sbhd" else (0, 2, 1, 3)
    done: list[Tensor | None] = []
    for number, source in enumerate(inputs):
        if source is None:
            done.append(None)
            continue
        nvte_check(source.dim() == 4, SOURCE, f"{name}: input {number} must be a 4D CUDA tensor.")
        nvte_check(
            source.dtype in (*_HALF, torch.uint8), SOURCE, f"{name}: unsupported dtype at index {number}."
        )
        turned = source.detach().permute(order)
        target = outputs[number] if outputs else None
        if target is None:
            done.append(turned.contiguous())
            continue
        wide = target.detach().view(*turned.shape[:3], -1)
        wide[..., : turned.shape[3]] = turned
        wide[..., turned.shape[3] :] = 0
        done.append(target)
    return done


def multi_tensor_pad_last_dim(inputs: Sequence[Tensor], alignment: int) -> list[Tensor]:
    """Each matrix with zeros up to a multiple of columns; one that has it is returned as it is."""
    name = "multi_tensor_pad_last_dim"
    nvte_check(alignment > 0, SOURCE, f"{name}: alignment must be > 0.")
    nvte_check(len(inputs) > 0, SOURCE, f"{name}: inputs must not be empty.")
    for number, source in enumerate(inputs):
        nvte_check(
            source.dim() == 2,
            SOURCE,
            f"{name}: expected 2D input at index {number}, got {source.dim()}D.",
        )
    return [
        pad(source.detach(), (0, -source.shape[1] % alignment))
        if source.shape[1] % alignment
        else source.contiguous()
        for source in inputs
    ]


def fa_prepare_fwd(qkvi: Tensor) -> Tensor:
    """[3, b, s, n, h] from a view of the first of [s, b, n, 3 * h]: query, key and value lie interleaved."""
    steps, batch, heads, width = qkvi.shape
    nvte_check(qkvi.dtype in _HALF, SOURCE, "Expected fp16 or bf16.")
    expected = (3 * width * heads * batch, 3 * width * heads, 3 * width, 1)
    nvte_check(qkvi.stride() == expected, SOURCE, "Wrong stride.")
    nvte_check(width == _HEAD, "common/fused_attn/flash_attn.cu", f"Expected {_HEAD} values a head.")
    every = qkvi.detach().as_strided((steps, batch, heads, 3, width), (*expected[:3], width, 1))
    return every.permute(3, 1, 0, 2, 4).contiguous()


def fa_prepare_bwd(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[s, b, n, 3 * h] from three of [b, s, n, h]."""
    for part in (q, k, v):
        nvte_check(part.dim() == 4, SOURCE, "Expected 4-dim tensor.")
        nvte_check(part.is_contiguous(), SOURCE, "Expected a contiguous tensor.")
        nvte_check(part.dtype in _HALF and part.dtype == q.dtype, SOURCE, "Expected fp16 or bf16.")
        nvte_check(
            part.shape[3] == _HEAD, "common/fused_attn/flash_attn.cu", f"Expected {_HEAD} values a head."
        )
    return torch.cat([part.detach().transpose(0, 1) for part in (q, k, v)], dim=-1).contiguous()


def convert_thd_to_bshd(tensor: Tensor, cu_seqlens: Tensor, b: int, max_seq_len: int) -> Tensor:
    """Packed sequences, one a row; zeros behind each."""
    out = torch.zeros((b, max_seq_len, *tensor.shape[1:]), dtype=tensor.dtype)
    bounds = cu_seqlens.tolist()
    for number in range(b):
        begin, end = bounds[number], bounds[number + 1]
        out[number, : end - begin] = tensor.detach()[begin:end]
    return out


def convert_bshd_to_thd(tensor: Tensor, cu_seqlens: Tensor, t: int) -> Tensor:
    """The sequences of the rows, packed; zeros behind the last."""
    out = torch.zeros((t, *tensor.shape[2:]), dtype=tensor.dtype)
    bounds = cu_seqlens.tolist()
    for number in range(tensor.shape[0]):
        begin, end = bounds[number], bounds[number + 1]
        out[begin:end] = tensor.detach()[number, : end - begin]
    return out


def copy_to_kv_cache(
    new_k: Tensor,
    new_v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_new_lens: Tensor,
    cu_cached_lens: Tensor,
    qkv_format: Any,
    b: int,
    max_ctx_len: int,
    max_seq_len: int,
    max_pages_per_seq: int,
    is_non_paged: bool,
) -> None:
    """Append new keys and values to each sequence's pages [pages, tokens a page, heads, width].

    The lengths in the cache include the new tokens. Without pages a sequence is one page, and sequences that
    moved up in the batch are moved in the cache first.
    """
    nvte_check(
        len({x.dtype for x in (new_k, new_v, k_cache, v_cache)}) == 1,
        SOURCE,
        "new_k, new_v, k_cache and v_cache must be of the same data type.",
    )
    form = int(qkv_format)
    nvte_check(form in (_SBHD, _BSHD, _THD), SOURCE, "qkv_format must be {BSHD, SBHD, THD}.")
    page = max_seq_len // max_pages_per_seq
    new, cached = cu_new_lens.tolist(), cu_cached_lens.tolist()
    table = page_table.reshape(-1).tolist()
    for fresh, cache in ((new_k.detach(), k_cache.detach()), (new_v.detach(), v_cache.detach())):
        flat = cache.view(-1, *cache.shape[-2:])
        if is_non_paged:
            _move_up(flat, table, new, cached, b, max_seq_len)
        for number in range(b):
            count = new[number + 1] - new[number]
            before = cached[number + 1] - cached[number] - count
            for token in range(count):
                place = before + token
                if is_non_paged:
                    home = number
                else:
                    home = table[number * max_pages_per_seq + place // page]
                if form == _THD:
                    value = fresh[new[number] + token]
                else:
                    value = fresh[number, token] if form == _BSHD else fresh[token, number]
                flat[home * page + place % page] = value


def _move_up(
    flat: Tensor, indices: list[int], new: list[int], cached: list[int], b: int, max_seq_len: int
) -> None:
    """Bring the sequences that are left to the front of the cache, in order."""
    actual = b
    for number in range(b - 1):
        if indices[number + 1] < indices[number]:
            actual = number + 1
    for number in range(actual):
        if indices[0] != 0 or indices[number] - indices[0] != number:
            count = cached[number + 1] - cached[number] - (new[number + 1] - new[number])
            source, target = indices[number] * max_seq_len, number * max_seq_len
            flat[target : target + count] = flat[source : source + count].clone()
