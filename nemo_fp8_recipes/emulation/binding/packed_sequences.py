"""Packed sequences (THD) under context parallelism: which tokens a rank holds, and corrections between steps.

Follows `common/fused_attn/context_parallel.cu` and `pytorch/csrc/extensions/attention.cpp` of Transformer
Engine. Every sequence is cut into 2 * ranks chunks, and a rank holds the chunks `rank` and
`2 * ranks - 1 - rank` of each.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.binding.checks import nvte_check, nvte_error

__all__ = [
    "thd_copy_valid_tokens_from_per_split_to_rank_local",
    "thd_cp_rank_order_to_sequence_order",
    "thd_get_partitioned_indices",
    "thd_grad_correction",
    "thd_out_correction",
    "thd_read_half_tensor",
    "thd_read_second_half_lse",
    "thd_second_half_lse_correction",
    "thd_sequence_order_to_cp_rank_order",
]

SOURCE = "pytorch/csrc/extensions/attention.cpp"
_CORRECTIONS = {
    ("add", "none"),
    ("copy", "none"),
    ("none", "add"),
    ("none", "copy"),
    ("add", "copy"),
    ("copy", "add"),
}


def _bounds(cu_seqlens: Tensor, divided_by: int = 1) -> list[int]:
    nvte_check(cu_seqlens.dtype == torch.int32, SOURCE, "cu_seqlens must be int32.")
    nvte_check(cu_seqlens.dim() == 1 and cu_seqlens.numel() >= 2, SOURCE, "cu_seqlens must be 1D.")
    return [int(bound) // divided_by for bound in cu_seqlens.tolist()]


def thd_get_partitioned_indices(cu_seqlens: Tensor, total_tokens: int, world_size: int, rank: int) -> Tensor:
    """int32 [tokens / ranks]: the tokens that a rank holds."""
    nvte_check(0 <= rank < world_size, SOURCE, "rank must be below world_size.")
    nvte_check(
        total_tokens > 0 and total_tokens % (2 * world_size) == 0,
        SOURCE,
        "total_tokens must be divisible by 2 * world_size.",
    )
    bounds = _bounds(cu_seqlens)
    held = []
    for begin, end in itertools.pairwise(bounds):
        chunk = (end - begin) // (2 * world_size)
        for which in (rank, 2 * world_size - 1 - rank):
            held.append(torch.arange(begin + which * chunk, begin + (which + 1) * chunk))
    indices = torch.cat(held).to(torch.int32)
    out = torch.empty(total_tokens // world_size, dtype=torch.int32)
    out[: len(indices)] = indices
    return out


def _reordered(cu_seqlens: Tensor, cp_size: int, total_tokens: int) -> Tensor:
    """Where each token in the order of ranks lies in the order of sequences."""
    parts = [thd_get_partitioned_indices(cu_seqlens, total_tokens, cp_size, rank) for rank in range(cp_size)]
    return torch.cat(parts).long()


def thd_sequence_order_to_cp_rank_order(
    inp: Tensor, cu_seqlens: Tensor, cp_size: int, total_tokens: int
) -> Tensor:
    nvte_check(inp.shape[0] == total_tokens, SOURCE, "The first dimension must be total_tokens.")
    return inp.detach()[_reordered(cu_seqlens, cp_size, total_tokens)]


def thd_cp_rank_order_to_sequence_order(
    inp: Tensor, cu_seqlens: Tensor, cp_size: int, total_tokens: int
) -> Tensor:
    nvte_check(inp.shape[0] == total_tokens, SOURCE, "The first dimension must be total_tokens.")
    out = torch.empty_like(inp, memory_format=torch.contiguous_format)
    out[_reordered(cu_seqlens, cp_size, total_tokens)] = inp.detach()
    return out


def thd_copy_valid_tokens_from_per_split_to_rank_local(
    out: Tensor, inp: Tensor, cu_seqlens_padded: Tensor, cu_seqlens: Tensor
) -> None:
    """Copy the tokens of each padded sequence that are no padding."""
    nvte_check(
        out.shape == inp.shape and out.dtype == inp.dtype and out.is_contiguous(),
        SOURCE,
        "thd_copy_valid_tokens_from_per_split_to_rank_local output must be contiguous and like the input.",
    )
    padded, valid = _bounds(cu_seqlens_padded), _bounds(cu_seqlens)
    nvte_check(len(padded) == len(valid), SOURCE, "Both cumulative lengths must have the same length.")
    for begin, end, first, last in zip(padded[:-1], padded[1:], valid[:-1], valid[1:], strict=True):
        count = min(last - first, end - begin)
        out.detach()[begin : begin + count] = inp.detach()[begin : begin + count]


def _halves(cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of the first and of the second halves of all sequences."""
    bounds = _bounds(cu_seqlens, 2)
    first, second = [], []
    for begin, end in itertools.pairwise(bounds):
        steps = torch.arange(begin, end)
        first.append(steps + begin)
        second.append(steps + end)
    return torch.cat(first), torch.cat(second)


def thd_read_half_tensor(tensor: Tensor, cu_seqlens: Tensor, half_idx: int) -> Tensor:
    """[t / 2, h, d] or [2, t / 2, h, d]: one half of every sequence."""
    nvte_check(tensor.dim() in (3, 4), SOURCE, "Expected a 3D or 4D tensor.")
    hidden = tensor.shape[-1] * tensor.shape[-2] * tensor.element_size()
    nvte_check(hidden % 16 == 0, SOURCE, "The bytes of a token must be a multiple of 16.")
    along = tensor.dim() - 3
    chosen = _halves(cu_seqlens)[half_idx]
    shape = list(tensor.shape)
    shape[along] //= 2
    out = torch.empty(shape, dtype=tensor.dtype)
    out.narrow(along, 0, len(chosen)).copy_(tensor.detach().index_select(along, chosen))
    return out


def _second_halves(cu_seqlens: Tensor, packed: bool) -> list[tuple[int, slice, slice]]:
    """(sequence, where its second half lies in the whole, and in the half) for log-sum-exps."""
    bounds = _bounds(cu_seqlens, 2)
    places = []
    for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
        length = end - begin
        if packed:
            places.append((0, slice(begin + end, 2 * end), slice(begin, end)))
        else:
            places.append((number, slice(length, 2 * length), slice(0, length)))
    return places


def _by_sequence(lse: Tensor, packed: bool) -> Tensor:
    """[sequences or 1, heads, steps]."""
    nvte_check(lse.dtype == torch.float32, SOURCE, "softmax_lse must be float32.")
    nvte_check(lse.dim() == (2 if packed else 3), SOURCE, "Unexpected dimensions of softmax_lse.")
    return lse.detach()[None] if packed else lse.detach()


def thd_second_half_lse_correction(
    lse: Tensor, lse_per_step: Tensor, cu_seqlens: Tensor, lse_packed: bool
) -> None:
    """lse = log(exp(lse) + exp(lse_per_step)) for the second halves, in place."""
    whole, half = _by_sequence(lse, lse_packed), _by_sequence(lse_per_step, lse_packed)
    for number, there, here in _second_halves(cu_seqlens, lse_packed):
        old, step = whole[number, :, there], half[number, :, here]
        largest = torch.maximum(old, step)
        whole[number, :, there] = largest + torch.log1p(torch.exp(torch.minimum(old, step) - largest))


def thd_read_second_half_lse(
    lse: Tensor, cu_seqlens: Tensor, lse_packed: bool, second_half_lse_seqlen: int
) -> Tensor:
    whole = _by_sequence(lse, lse_packed)
    half = torch.zeros((*whole.shape[:2], second_half_lse_seqlen), dtype=torch.float32)
    for number, there, here in _second_halves(cu_seqlens, lse_packed):
        half[number, :, here] = whole[number, :, there]
    return half[0] if lse_packed else half


def thd_out_correction(
    out: Tensor,
    out_per_step: Tensor,
    lse: Tensor,
    lse_per_step: Tensor,
    cu_seqlens: Tensor,
    only_second_half: bool,
    lse_packed: bool,
) -> None:
    """Add a step's output, weighted with exp(lse_per_step - lse), in place; the product and then the sum are
    rounded to the dtype of the output.
    """
    whole, step = _by_sequence(lse, lse_packed), _by_sequence(lse_per_step, lse_packed)
    bounds = _bounds(cu_seqlens, 2 if only_second_half else 1)
    target, source = out.detach(), out_per_step.detach()
    for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
        length, skipped = end - begin, (end if only_second_half else 0)
        if lse_packed:
            there, here, row = slice(begin + skipped, end + skipped), slice(begin, end), 0
        else:
            moved = length if only_second_half else 0
            there, here, row = slice(moved, moved + length), slice(0, length), number
        weight = torch.exp(step[row, :, here] - whole[row, :, there]).t()[..., None]
        part = source[begin:end]
        # A zero stays zero, whatever its weight.
        scaled = torch.where(part == 0, 0.0, part.to(torch.float32) * weight).to(out.dtype)
        target[begin + skipped : end + skipped] += scaled


def thd_grad_correction(
    grad: Tensor, grad_per_step: Tensor, cu_seqlens: Tensor, first_half: str, second_half: str
) -> None:
    """Add or copy a step's gradients into the halves of the sequences, in place."""
    if (first_half, second_half) not in _CORRECTIONS:
        nvte_error(
            "common/fused_attn/context_parallel.cu", "Unsupported Functor of first half and second_half"
        )
    along = grad.dim() - 3
    target, source = grad.detach(), grad_per_step.detach()
    halves = _halves(cu_seqlens)
    both = "none" not in (first_half, second_half)
    for what, tokens in zip((first_half, second_half), halves, strict=True):
        if what == "none":
            continue
        # A step that has one half only has its tokens packed.
        found = tokens if both else torch.arange(len(tokens))
        part = source.index_select(along, found)
        if what == "copy":
            target.index_copy_(along, tokens, part)
        else:
            target.index_copy_(along, tokens, target.index_select(along, tokens) + part)
