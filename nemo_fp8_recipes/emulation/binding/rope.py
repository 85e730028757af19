"""Rotary position embedding, of one tensor or of query, key and value in one.

Follows `pytorch/csrc/extensions/apply_rope.cpp` and `common/fused_rope/fused_rope.cu` of Transformer Engine.
x cos + rotate(x) sin in fp32, rounded once; the angles are fp32 [positions, 1, 1, d2], and what of a head
lies beyond d2 is copied. Under context parallelism a rank holds the chunks `rank` and `2 size - 1 - rank` of
each sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.binding.checks import nvte_check

__all__ = [
    "fused_qkv_rope_backward",
    "fused_qkv_rope_forward",
    "fused_rope_backward",
    "fused_rope_forward",
]

SOURCE = "pytorch/csrc/extensions/apply_rope.cpp"
KERNEL = "common/fused_rope/fused_rope.cu"
_SBHD, _BSHD, _THD = 0, 1, 2


def fused_rope_forward(
    input: Tensor,
    freqs: Tensor,
    start_positions: Tensor | None,
    qkv_format: Any,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    """Embed the positions of [s, b, h, d], [b, s, h, d] or packed [t, h, d]."""
    return _apply(
        input, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank, backward=False
    )


def fused_rope_backward(
    output_grads: Tensor,
    freqs: Tensor,
    start_positions: Tensor | None,
    qkv_format: Any,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    return _apply(
        output_grads,
        freqs,
        start_positions,
        qkv_format,
        interleaved,
        cu_seqlens,
        cp_size,
        cp_rank,
        backward=True,
    )


def fused_qkv_rope_forward(
    qkv_input: Tensor,
    q_freqs: Tensor,
    k_freqs: Tensor,
    start_positions: Tensor | None,
    qkv_split_arg_list: Sequence[int],
    qkv_format: Any,
    interleaved: bool,
    cp_size: int,
    cp_rank: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split [s, b, groups, q + k + v] and embed the positions of query and key."""
    for freqs in (q_freqs, k_freqs):
        _check_freqs(freqs)
    nvte_check(qkv_input.dim() == 4, SOURCE, "expected 4D input tensor")
    nvte_check(qkv_input.is_contiguous(), SOURCE, "input tensor must be contiguous")
    q, k, v = (
        part.unflatten(-1, (-1, qkv_split_arg_list[2])).flatten(2, 3)
        for part in qkv_input.detach().split(list(qkv_split_arg_list), dim=-1)
    )
    # With context parallelism the start positions are not looked at.
    starts = start_positions if cp_size == 1 else None
    place = _positions(q, qkv_format, starts, cp_size, cp_rank)
    return (
        _rotate(q, _angles(q_freqs, place), interleaved, backward=False),
        _rotate(k, _angles(k_freqs, place), interleaved, backward=False),
        v.contiguous(),
    )


def fused_qkv_rope_backward(
    q_grad_out: Tensor,
    k_grad_out: Tensor,
    v_grad_out: Tensor,
    q_freqs: Tensor,
    k_freqs: Tensor,
    qkv_split_arg_list: Sequence[int],
    qkv_format: Any,
    interleaved: bool,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    place = _positions(q_grad_out, qkv_format, None, cp_size, cp_rank)
    parts = (
        _rotate(q_grad_out.detach(), _angles(q_freqs, place), interleaved, backward=True),
        _rotate(k_grad_out.detach(), _angles(k_freqs, place), interleaved, backward=True),
        v_grad_out.detach(),
    )
    groups = sum(part.shape[2] * part.shape[3] for part in parts) // sum(qkv_split_arg_list)
    return torch.cat([part.reshape(*part.shape[:2], groups, -1) for part in parts], dim=-1)


def _check_freqs(freqs: Tensor) -> None:
    nvte_check(freqs.dim() == 4, SOURCE, "expected 4D tensor")
    nvte_check(
        freqs.shape[1] == freqs.shape[2] == 1,
        SOURCE,
        "expected the second and third dims of the freqs tensor equal 1",
    )
    nvte_check(freqs.dtype == torch.float32, SOURCE, "Dtype of the freqs tensor must be float")


def _apply(
    x: Tensor,
    freqs: Tensor,
    start_positions: Tensor | None,
    qkv_format: Any,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
    *,
    backward: bool,
) -> Tensor:
    _check_freqs(freqs)
    name = "output_grads" if backward else "input"
    packed = int(qkv_format) == _THD
    nvte_check(x.dim() == (3 if packed else 4), SOURCE, f"expected {3 if packed else 4}D tensor")
    nvte_check(
        x.shape[-1] >= freqs.shape[3],
        SOURCE,
        f"expected the last dim of the {name} tensor equals or is greater than the freqs tensor",
    )
    nvte_check(start_positions is None or start_positions.dim() == 1, SOURCE, "expected 1D tensor")
    x = x.detach()
    if packed:
        nvte_check(cu_seqlens is not None, SOURCE, "expected cu_seqlens tensor")
        assert cu_seqlens is not None
        nvte_check(cu_seqlens.dim() == 1, SOURCE, "expected 1D tensor")
        place = _packed_positions(cu_seqlens, start_positions, cp_size, cp_rank)
        rotated = _rotate(x[: len(place)], _angles(freqs, place), interleaved, backward=backward)
        if len(place) == len(x):
            return rotated
        # What lies behind the last sequence is never written.
        out = torch.empty(x.shape, dtype=x.dtype)
        out[: len(place)] = rotated
        return out
    steps = x.shape[0] if int(qkv_format) == _SBHD else x.shape[1]
    nvte_check(
        steps * cp_size <= freqs.shape[0],
        SOURCE,
        f"expected freqs tensor has a longer sequence length than {name}",
    )
    place = _positions(x, qkv_format, start_positions, cp_size, cp_rank)
    return _rotate(x, _angles(freqs, place), interleaved, backward=backward)


def _in_sequence(length: int, cp_size: int, cp_rank: int) -> Tensor:
    """Position of each of a rank's tokens in its sequence, of which it holds `length`."""
    steps = torch.arange(length)
    if cp_size == 1:
        return steps
    nvte_check(
        length % 2 == 0,
        KERNEL,
        f"cur_seqlens % 2 == 0: a rank holds two chunks of one length of each sequence, and of one it has "
        f"{length} tokens. Pad the sequences to a multiple of {2 * cp_size}.",
    )
    half = length // 2
    first = cp_rank * length // 2
    second = length * cp_size - (cp_rank + 1) * length // 2 - half
    return steps + torch.where(steps < half, first, second)


def _positions(
    x: Tensor, qkv_format: Any, start_positions: Tensor | None, cp_size: int, cp_rank: int
) -> Tensor:
    """int64 [s, b] or [b, s], as x has its first two dimensions; or with a 1 for b where all are alike."""
    sequence_first = int(qkv_format) == _SBHD
    steps = _in_sequence(x.shape[0] if sequence_first else x.shape[1], cp_size, cp_rank)
    starts = torch.zeros(1, dtype=torch.int64) if start_positions is None else start_positions.long()
    return steps[:, None] + starts if sequence_first else starts[:, None] + steps


def _packed_positions(
    cu_seqlens: Tensor, start_positions: Tensor | None, cp_size: int, cp_rank: int
) -> Tensor:
    """int64 [t]: the positions of the tokens of sequences packed one after the other."""
    bounds = [bound // cp_size for bound in cu_seqlens.tolist()]
    starts = [0] * len(bounds) if start_positions is None else start_positions.tolist()
    parts = [
        _in_sequence(end - begin, cp_size, cp_rank) + start
        for begin, end, start in zip(bounds[:-1], bounds[1:], starts, strict=False)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def _angles(freqs: Tensor, place: Tensor) -> Tensor:
    """fp32 [..., 1, d2]."""
    last = int(place.max()) if place.numel() else -1
    nvte_check(
        last < len(freqs),
        KERNEL,
        f"There is a token at position {last}, and the freqs tensor has {len(freqs)}.",
    )
    return freqs.detach()[:, 0, 0][place].unsqueeze(-2)


def _rotate(x: Tensor, angles: Tensor, interleaved: bool, *, backward: bool) -> Tensor:
    width = angles.shape[-1]
    turned, rest = x[..., :width].to(torch.float32), x[..., width:]
    cos, sin = torch.cos(angles), torch.sin(angles)
    if backward:
        # The transpose of the rotation: the sine is that of the other element of the pair.
        result = turned * cos - _partner(turned * sin, interleaved)
    else:
        result = turned * cos + _partner(turned, interleaved) * sin
    return torch.cat((result.to(x.dtype), rest), dim=-1).contiguous()


def _partner(x: Tensor, interleaved: bool) -> Tensor:
    """-x2 for x1 and x1 for x2, where (x1, x2) are the pairs that turn."""
    if interleaved:
        pairs = x.unflatten(-1, (-1, 2))
        return torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
