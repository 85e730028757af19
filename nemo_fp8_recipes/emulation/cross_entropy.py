"""The loss and its gradient that Transformer Engine's `parallel_cross_entropy` computes in Triton kernels.

Follows `common/triton/cross_entropy.py` of Transformer Engine 2.20: all in fp32, the gradient rounded once
to the type of the logits. Sums over the vocabulary are in torch's order, not block by block. Releases
before 2.20 have other functions; of those nothing runs here.
"""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

__all__ = ["replace_kernels"]


def replace_kernels(module: ModuleType) -> None:
    """Put the functions of this file in the place of those that launch kernels, where they are the same ones.

    Args:
        module: `transformer_engine.pytorch.triton.cross_entropy`.
    """
    for function in (cross_entropy_forward, cross_entropy_backward):
        if _parameters(getattr(module, function.__name__)) != _parameters(function):
            return
    for function in (cross_entropy_forward, cross_entropy_backward):
        setattr(module, function.__name__, function)


def _parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]  # a callable


def cross_entropy_forward(
    _input: Tensor,
    target: Tensor,
    label_smoothing: float,
    reduce_loss: bool,
    dist_process_group: ProcessGroup | None,
    ignore_idx: int,
    overwrite_input: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, int, int]:
    """The loss of each row, or their mean, and what the gradient is made of.

    Args:
        _input: bf16 or fp32 logits [B, SQ, V] of this rank's part of the vocabulary.
        target: int64, B * SQ indices into the whole vocabulary; rows of `ignore_idx` have no loss.
        label_smoothing: 0 to 1.
        reduce_loss: the mean over the rows that are not ignored.
        dist_process_group: the ranks that have the other parts, in their order.
        overwrite_input: keep the logits themselves, not a copy.

    Returns:
        The loss, fp32 [B, SQ] or [1]; the kept logits; each row's largest logit and sum of exponentials, fp32
        [B * SQ, 2]; the target, contiguous; how many rows count, int64 [1] if the loss is reduced; rank and
        number of ranks.
    """
    import torch
    import torch.distributed as dist

    rows, columns = target.numel(), _input.shape[-1]
    rank = 0 if dist_process_group is None else dist.get_rank(dist_process_group)
    ranks = 1 if dist_process_group is None else dist.get_world_size(dist_process_group)
    target = target.contiguous()
    saved = _input if overwrite_input else _input.clone(memory_format=torch.contiguous_format)
    logits, index = saved.reshape(rows, columns).float(), target.view(rows)
    counts = index != ignore_idx

    largest = logits.amax(dim=1)
    parts = torch.stack(
        [
            largest,
            (logits - largest[:, None]).exp().sum(dim=1),
            _logit_of(index - rank * columns, logits),
            logits.sum(dim=1),
        ]
    )
    if ranks > 1:
        gathered = parts.new_empty((ranks * parts.shape[0], rows))
        dist.all_gather_into_tensor(gathered, parts, group=dist_process_group)
        largests, sums, of_target, totals = gathered.view(ranks, *parts.shape).unbind(dim=1)
        largest = largests.amax(dim=0)
        parts = torch.stack(
            [largest, (sums * (largests - largest).exp()).sum(0), of_target.amax(dim=0), totals.sum(dim=0)]
        )
    largest, exponentials, logit, total = parts
    log_sum = largest + exponentials.log()
    loss = log_sum - logit
    if label_smoothing > 0:
        even = label_smoothing * log_sum - label_smoothing / (columns * ranks) * total
        loss = loss * (1 - label_smoothing) + even
    loss = torch.where(counts, loss, 0.0)
    stats = torch.stack([largest, exponentials], dim=1)
    counted = None
    if reduce_loss:
        counted = counts.sum().view(1).clamp(min=1)
        loss = loss.sum() / counted
    else:
        loss = loss.view(_input.shape[:2])
    return loss, saved, stats, target, counted, rank, ranks


def cross_entropy_backward(
    saved_input: Tensor,
    stats: Tensor,
    target: Tensor,
    n_non_ignore: Tensor | None,
    grad_output: Tensor,
    label_smoothing: float,
    reduce_loss: bool,
    rank: int,
    world_size: int,
    ignore_idx: int,
) -> Tensor:
    """The gradient of the logits, written over those kept by `cross_entropy_forward`.

    Args:
        grad_output: of the loss: fp32 [B, SQ], or one number.
        n_non_ignore: how many rows count, where the loss is their mean.
    """
    import torch

    rows, columns = target.numel(), saved_input.shape[-1]
    index = target.view(rows)
    upstream = grad_output.detach().reshape(-1).float()
    if reduce_loss and n_non_ignore is not None:
        upstream = upstream / n_non_ignore
    gradient = (saved_input.reshape(rows, columns).float() - stats[:, :1]).exp() / stats[:, 1:]
    gradient -= label_smoothing / (columns * world_size)
    local = index - rank * columns
    here = ((local >= 0) & (local < columns)).nonzero()[:, 0]
    gradient[here, local[here]] -= 1 - label_smoothing
    gradient *= upstream[:, None]
    gradient = torch.where((index != ignore_idx)[:, None], gradient, 0.0)
    saved_input.copy_(gradient.view(saved_input.shape))
    return saved_input


def _logit_of(index: Tensor, logits: Tensor) -> Tensor:
    """Each row's logit at `index`; minus infinity where that is another rank's, or nobody's."""
    import torch

    columns = logits.shape[1]
    here = (index >= 0) & (index < columns)
    found = logits.gather(1, index.clamp(0, columns - 1)[:, None])[:, 0]
    return torch.where(here, found, float("-inf"))
