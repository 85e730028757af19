"""Tokens moved to experts by a mask, through Transformer Engine's own functions, against plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = pytest.mark.usefixtures("emulated")

TOKENS, EXPERTS, HIDDEN, TOPK = 13, 5, 32, 2


def routing() -> tuple[torch.Tensor, torch.Tensor]:
    """A mask int32 [tokens, experts], one token of which goes nowhere; probabilities, 0 outside."""
    generator = torch.Generator().manual_seed(2)
    chosen = torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOPK, dim=1).indices
    mask = torch.zeros(TOKENS, EXPERTS, dtype=torch.int32).scatter(1, chosen, 1)
    mask[4] = 0
    return mask, torch.rand(TOKENS, EXPERTS, generator=generator) * mask


def copies(mask: torch.Tensor) -> list[tuple[int, int]]:
    """(token, expert) of every permuted row: by expert, then by token."""
    return [(token, expert) for expert in range(EXPERTS) for token in range(TOKENS) if mask[token, expert]]


def leaf(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(shape, generator=generator).bfloat16().requires_grad_()


def test_there_and_back_with_gradients(te: Any) -> None:
    mask, probs = routing()
    expected = copies(mask)
    x = leaf(TOKENS, HIDDEN)
    permuted, row_id_map = te.moe_permute(x, mask, num_out_tokens=len(expected), map_type="mask")
    assert torch.equal(permuted, torch.stack([x[token] for token, _ in expected]))

    inner = permuted.detach().requires_grad_()
    weights = probs.clone().requires_grad_()
    merged = te.moe_unpermute(
        inner, row_id_map, merging_probs=weights, restore_shape=x.shape, map_type="mask"
    )
    reference = torch.zeros(TOKENS, HIDDEN)
    for row, (token, expert) in reversed(list(enumerate(expected))):
        reference[token] += inner.detach()[row].float() * probs[token, expert]
    assert torch.equal(merged, reference.bfloat16())
    assert merged[4].count_nonzero() == 0

    upstream = leaf(TOKENS, HIDDEN).detach()
    merged.backward(upstream)
    assert inner.grad is not None
    assert weights.grad is not None
    for row, (token, expert) in enumerate(expected):
        assert torch.equal(inner.grad[row], (upstream[token].float() * probs[token, expert]).bfloat16())
        dot = (inner.detach()[row].float() * upstream[token].float()).sum()
        assert torch.allclose(weights.grad[token, expert], dot, atol=1e-5)
    assert (weights.grad[mask == 0] == 0).all()

    permuted.backward(torch.ones_like(permuted))
    assert x.grad is not None
    assert torch.equal(x.grad, mask.sum(1, keepdim=True).expand(-1, HIDDEN).bfloat16())


def test_a_copy_of_probability_zero_is_padding_and_probabilities_move_along(te: Any) -> None:
    mask, probs = routing()
    expected = copies(mask)
    token, expert = expected[3]
    probs[token, expert] = 0
    probs.requires_grad_()
    x = leaf(TOKENS, HIDDEN)
    permuted, moved, _ = te.moe_permute_with_probs(x, probs, mask, num_out_tokens=len(expected))
    assert moved.tolist() == [probs[place].item() for place in expected]
    assert permuted[3].count_nonzero() == 0
    assert torch.equal(permuted[2], x[expected[2][0]])
    moved.backward(torch.arange(len(expected), dtype=torch.float32))
    assert probs.grad is not None
    assert [probs.grad[place].item() for place in expected] == list(range(len(expected)))


@pytest.mark.parametrize("align", [16, 32])
def test_experts_are_padded_with_zeros(te: Any, align: int) -> None:
    mask, probs = routing()
    expected = copies(mask)
    counts = mask.sum(0)
    x = leaf(TOKENS, HIDDEN)
    permuted, _, row_id_map, offsets, padded = te.moe_permute_and_pad_with_probs(
        x, probs, mask, counts, align
    )
    assert padded.tolist() == [-(-count // align) * align for count in counts.tolist()]
    start = 0
    for expert in range(EXPERTS):
        own = [token for token, other in expected if other == expert]
        assert torch.equal(permuted[start : start + len(own)], x[own])
        assert permuted[start + len(own) : start + int(padded[expert])].count_nonzero() == 0
        start += int(padded[expert])
    back = te.moe_unpermute(permuted, row_id_map, restore_shape=x.shape, map_type="mask", pad_offsets=offsets)
    assert torch.equal(back, (x * mask.sum(1, keepdim=True)).bfloat16())


def test_chunks_take_another_order_and_come_back(te: Any) -> None:
    sizes, order = [3, 0, 4, 2], [2, 0, 3, 1]
    x, probs = leaf(9, HIDDEN), torch.arange(9.0).requires_grad_()
    arguments = torch.tensor(sizes, dtype=torch.int32), torch.tensor(order, dtype=torch.int32)
    moved, moved_probs = te.moe_sort_chunks_by_index_with_probs(x, probs, *arguments)
    rows = [3, 4, 5, 6, 0, 1, 2, 7, 8]
    assert torch.equal(moved, x[rows])
    assert moved_probs.tolist() == rows
    (moved.float() * torch.arange(9.0)[:, None]).sum().backward()
    assert x.grad is not None
    assert x.grad[rows, 0].tolist() == list(range(9))


@pytest.fixture
def te() -> Any:
    import transformer_engine.pytorch

    return transformer_engine.pytorch
