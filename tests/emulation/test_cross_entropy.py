"""Transformer Engine's `parallel_cross_entropy` against torch's, whole and cut between two ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = pytest.mark.usefixtures("emulated")

SHAPE = (3, 5, 48)
IGNORED = -100


@pytest.fixture
def parallel_cross_entropy() -> Any:
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    return parallel_cross_entropy


def batch(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    logits = (torch.randn(SHAPE, generator=generator) * 4).to(dtype)
    target = torch.randint(SHAPE[-1], SHAPE[:2], generator=generator)
    target[1, 2] = target[2, 4] = IGNORED
    return logits, target


def reference(
    logits: torch.Tensor, target: torch.Tensor, smoothing: float, reduction: str, upstream: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient in fp64."""
    x = logits.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(
        x.view(-1, x.shape[-1]),
        target.view(-1),
        ignore_index=IGNORED,
        reduction=reduction,
        label_smoothing=smoothing,
    )
    loss.backward(upstream.double().view(loss.shape))
    assert x.grad is not None
    return loss.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("overwrite", [True, False])
def test_loss_and_gradient(
    parallel_cross_entropy: Any, dtype: torch.dtype, smoothing: float, reduce: bool, overwrite: bool
) -> None:
    logits, target = batch(dtype)
    upstream = torch.tensor(1.7) if reduce else torch.linspace(-2, 3, 15).view(SHAPE[:2])
    expected, gradient = reference(logits, target, smoothing, "mean" if reduce else "none", upstream)
    leaf = logits.clone().requires_grad_()
    x = leaf.clone()
    loss = parallel_cross_entropy(x, target, smoothing, reduce, None, IGNORED, overwrite_input=overwrite)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double().view(expected.shape), expected, rtol=1e-5, atol=1e-5)
    if not overwrite:
        assert torch.equal(x, logits)
    loss.backward(upstream.view(loss.shape))
    assert leaf.grad is not None
    assert leaf.grad.dtype == dtype
    precision = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(leaf.grad.double(), gradient, rtol=precision, atol=1e-6)
    assert leaf.grad[1, 2].count_nonzero() == 0


def test_logits_that_do_not_lie_row_by_row(parallel_cross_entropy: Any) -> None:
    logits, target = batch(torch.float32)
    loss = parallel_cross_entropy(logits.transpose(0, 1).contiguous().transpose(0, 1), target)
    assert torch.equal(loss, parallel_cross_entropy(logits, target))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_vocabulary_cut_between_ranks(monkeypatch: pytest.MonkeyPatch, smoothing: float) -> None:
    from transformer_engine.pytorch.triton import cross_entropy

    logits, target = batch(torch.float32)
    upstream = torch.linspace(-2, 3, 15).view(SHAPE[:2])
    expected, gradient = reference(logits, target, smoothing, "none", upstream)
    shards = [shard.contiguous() for shard in logits.chunk(2, dim=-1)]
    sent: list[torch.Tensor] = []

    def forward(rank: int) -> Any:
        monkeypatch.setattr("torch.distributed.get_rank", lambda _group: rank)
        monkeypatch.setattr("torch.distributed.get_world_size", lambda _group: 2)
        return cross_entropy.cross_entropy_forward(
            shards[rank], target, smoothing, False, object(), IGNORED, False
        )

    def first_pass(out: torch.Tensor, part: torch.Tensor, group: object) -> None:
        sent.append(part.clone())
        out.zero_()

    def second_pass(out: torch.Tensor, part: torch.Tensor, group: object) -> None:
        out.copy_(torch.cat(sent))

    monkeypatch.setattr("torch.distributed.all_gather_into_tensor", first_pass)
    for rank in range(2):
        forward(rank)
    monkeypatch.setattr("torch.distributed.all_gather_into_tensor", second_pass)
    for rank in range(2):
        loss, saved, stats, index, counted, *place = forward(rank)
        torch.testing.assert_close(loss.double().view(-1), expected, rtol=1e-5, atol=1e-5)
        found = cross_entropy.cross_entropy_backward(
            saved, stats, index, counted, upstream, smoothing, False, *place, IGNORED
        )
        torch.testing.assert_close(found.double(), gradient.chunk(2, dim=-1)[rank], rtol=1e-5, atol=1e-6)
