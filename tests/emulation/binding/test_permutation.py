"""Permuting tokens to their experts through TE's own functions, against loops and autograd."""

from __future__ import annotations

import pytest
import torch

from tests.support.te_release import since


def sorted_copies(indices, kept):
    """(token, choice) of the rows, in the order of their experts."""
    tokens, each = indices.shape
    copies = [(int(indices[t, c]), t, c) for t in range(tokens) for c in range(each)]
    return [(t, c) for _, t, c in sorted(copies, key=lambda copy: copy[0])][:kept]


@pytest.mark.parametrize("kept", [0, 9])
@pytest.mark.parametrize("each", [1, 2])
def test_permute_and_unpermute(te, kept, each):
    from transformer_engine.pytorch import moe_permute, moe_unpermute

    torch.manual_seed(3)
    tokens, columns = 7, 16
    x = torch.randn(tokens, columns, requires_grad=True)
    indices = torch.stack([torch.randperm(4)[:each] for _ in range(tokens)]).int()
    kept = min(kept, tokens * each)
    copies = sorted_copies(indices, kept or None)
    probs = torch.rand(tokens, each, requires_grad=True)

    permuted, rows = moe_permute(x, indices, num_out_tokens=kept, map_type="index")
    expected = x[[t for t, _ in copies]]
    assert torch.equal(permuted, expected)
    weight = torch.randn_like(expected)
    out = moe_unpermute(permuted * weight, rows, probs, map_type="index")
    reference = torch.zeros(tokens, columns)
    for row, (t, c) in enumerate(copies):
        reference = reference.index_add(
            0, torch.tensor([t]), (expected * weight)[row : row + 1] * probs[t, c]
        )
    torch.testing.assert_close(out, reference)
    dy = torch.randn_like(out)
    got = torch.autograd.grad(out, (x, probs), dy)
    wanted = torch.autograd.grad(reference, (x, probs), dy)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


@since("2.17")
def test_a_negative_expert_drops_the_copy(te, tex):
    x = torch.arange(3.0)[:, None].expand(3, 8).contiguous()
    indices = torch.tensor([[1, -1], [0, 1], [-1, 0]], dtype=torch.int32)
    out, rows, _ = tex.moe_permute_fwd(x, te.DType.kFloat32, indices, 4, [], 6)
    assert out[:, 0].tolist() == [1.0, 2.0, 0.0, 1.0]
    assert rows.view(2, 3).tolist() == [[2, 0, -1], [-1, 3, 1]]


def test_fp8_rows_are_averaged(te, tex):
    codes = torch.randn(4, 16).to(torch.float8_e4m3fn)
    rows = torch.tensor([0, 1, 2, 3], dtype=torch.int32)  # two choices of two tokens
    out = tex.moe_unpermute_fwd(codes.view(torch.uint8), te.DType.kFloat8E4M3, rows, torch.empty(0), 2, 2)
    mean = (codes[:2].half() + codes[2:].half()) / 2
    assert torch.equal(out.view(torch.float8_e4m3fn).float(), mean.to(torch.float8_e4m3fn).float())
