"""Scaled softmax kernels against torch's softmax and autograd."""

from __future__ import annotations

import pytest
import torch

SCALE = 0.125
BF16 = torch.bfloat16


def reference(scores, scale, masked=None):
    leaf = scores.detach().float().requires_grad_()
    values = leaf * scale
    if masked is not None:
        values = values.masked_fill(masked, float("-inf"))
    return leaf, torch.softmax(values, dim=-1)


def check(found, expected):
    torch.testing.assert_close(found.float(), expected.detach(), rtol=2**-7, atol=2**-9)


def backward(tex, name, y, scores, leaf, expected):
    dy = torch.randn_like(y)
    # The kernel differentiates at the rounded result; so does the reference, through a straight-through term.
    expected.backward(dy.float())
    found = getattr(tex, f"{name}_backward")(dy, y, SCALE)
    assert found.dtype == BF16
    assert found.data_ptr() not in (dy.data_ptr(), y.data_ptr())
    torch.testing.assert_close(found.float(), leaf.grad, rtol=2**-5, atol=2**-9)


def test_plain(tex):
    scores = torch.randn(2, 3, 8, 16, dtype=BF16) * 8
    leaf, expected = reference(scores, SCALE)
    y = tex.scaled_softmax_forward(scores, SCALE)
    check(y, expected)
    backward(tex, "scaled_softmax", y, scores, leaf, expected)


@pytest.mark.parametrize("batches", [1, 2])
def test_masked(tex, batches):
    scores = torch.randn(2, 3, 8, 16, dtype=BF16) * 8
    mask = torch.rand(batches, 1, 8, 16) < 0.4
    mask[..., 0] = False
    leaf, expected = reference(scores, SCALE, mask)
    y = tex.scaled_masked_softmax_forward(scores, mask, SCALE)
    check(y, expected)
    backward(tex, "scaled_masked_softmax", y, scores, leaf, expected)


def test_a_row_with_everything_masked_gives_zeros(tex):
    mask = torch.zeros(1, 1, 8, 16, dtype=torch.bool)
    mask[0, 0, 3] = True
    y = tex.scaled_masked_softmax_forward(torch.randn(2, 3, 8, 16, dtype=BF16), mask, SCALE)
    assert not y[:, :, 3].any()
    torch.testing.assert_close(y[:, :, 2].float().sum(-1), torch.ones(2, 3), rtol=0.02, atol=0.02)


def test_causal(tex):
    scores = torch.randn(6, 16, 16, dtype=BF16) * 8
    masked = torch.ones(16, 16, dtype=torch.bool).triu(1)
    leaf, expected = reference(scores, SCALE, masked)
    y = tex.scaled_upper_triang_masked_softmax_forward(scores, SCALE)
    check(y, expected)
    assert not y[:, masked].any()
    backward(tex, "scaled_upper_triang_masked_softmax", y, scores, leaf, expected)


@pytest.mark.parametrize("queries", [1, 8, 16])
def test_causal_aligned_to_the_end(tex, queries):
    scores = torch.randn(2, 3, queries, 16, dtype=BF16) * 8
    masked = torch.ones(queries, 16, dtype=torch.bool).triu(16 - queries + 1)
    leaf, expected = reference(scores, SCALE, masked)
    y = tex.scaled_aligned_causal_masked_softmax_forward(scores, SCALE)
    check(y, expected)
    assert not y[..., masked].any()
    backward(tex, "scaled_aligned_causal_masked_softmax", y, scores, leaf, expected)


def test_queries_that_see_no_key_give_zeros(tex):
    y = tex.scaled_aligned_causal_masked_softmax_forward(torch.randn(1, 1, 24, 16, dtype=BF16), SCALE)
    assert not y[0, 0, :8].any()
    assert y[0, 0, 8, 0] == 1


def test_the_forward_scale_is_rounded_to_the_scores_dtype(tex):
    scores = torch.full((1, 1, 2, 8), 0.0, dtype=BF16)
    scores[..., 0] = 8.0
    scale = 1.00390625  # 1 + 2^-8: bf16 has no such number
    rounded = tex.scaled_softmax_forward(scores, 1.0)
    assert torch.equal(tex.scaled_softmax_forward(scores, scale), rounded)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.randn(2, 3, 8, 16), "Only fp16 and bf16 are supported"),
        (torch.randn(2, 3, 8, 12, dtype=BF16), "divisible by 8"),
        (torch.randn(3, 8, 16, dtype=BF16), "expected 4D tensor"),
        (torch.randn(1, 1, 1, 16, dtype=BF16), "Query sequence length"),
    ],
)
def test_what_the_kernel_refuses(tex, scores, message):
    with pytest.raises(RuntimeError, match=message):
        tex.scaled_softmax_forward(scores, SCALE)
