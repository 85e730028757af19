"""One optimizer step, and the held-out loss: Megatron's schedules with this job's forward function."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from nemo_fp8_recipes.training.data import BatchPlan, Dataset

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel

__all__ = ["Forward", "reduce_loss"]

Micro = dict[str, torch.Tensor]


def _token_loss(per_token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum of the loss, number of tokens, and both as fp64 [2] for reporting; Megatron divides by the
    tokens."""
    losses = per_token.float()
    total = losses.sum()
    count = torch.tensor(losses.numel(), dtype=torch.int, device=losses.device)
    return total, count, torch.stack([total.detach().double(), count.double()])


def _forward_step(batches: Iterator[Micro], model: DistributedDataParallel) -> tuple[torch.Tensor, Any]:
    """Megatron's forward function of a micro-batch: the output of this pipeline stage and its loss
    function."""
    batch = _on_this_context_rank(next(batches))
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(_token_loss)


def _on_this_context_rank(batch: Micro) -> Micro:
    """This context-parallel rank's part of a batch, by Megatron's own function.

    The group is always named: newer releases of Megatron-Core take none for all processes of the job, and cut
    sequences by tensor and pipeline ranks too.
    """
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    offered = {"cp_group": parallel_state.get_context_parallel_group(), "is_hybrid_cp": False}
    known = _parameters(get_batch_on_this_cp_rank)
    part: Micro = get_batch_on_this_cp_rank(
        batch, **{name: value for name, value in offered.items() if name in known}
    )
    return part


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def reduce_loss(reports: list[torch.Tensor], device: torch.device, *flags: float) -> list[float]:
    """[mean loss per token over the global batch, then each of `flags` summed over ranks], on every rank.

    Only the last pipeline stage has reports, and its tensor-parallel ranks hold the same ones: the first
    speaks for them. One collective carries the loss and the flags."""
    from megatron.core import parallel_state

    row = torch.zeros(2 + len(flags), dtype=torch.float64)
    if reports and parallel_state.get_tensor_model_parallel_rank() == 0:
        row[:2] = torch.stack(reports).sum(0).cpu()
    row[2:] = torch.tensor(flags, dtype=torch.float64)
    if dist.get_world_size() > 1:
        row = row.to(device)
        dist.all_reduce(row)
    values = row.tolist()
    return [values[0] / values[1] if values[1] else float("nan"), *values[2:]]


@dataclass(frozen=True)
class Forward:
    """Runs the micro-batches of a step through Megatron's schedule (plain or pipelined)."""

    model: DistributedDataParallel
    dataset: Dataset
    plan: BatchPlan
    seq_length: int
    device: torch.device

    def train(self, consumed: int) -> list[torch.Tensor]:
        """Forward and backward of the global batch after `consumed` sequences; gradients are reduced. Returns
        the loss reports of this rank's micro-batches (none before the last pipeline stage)."""
        return self._run(self.plan.step(self.dataset.train, consumed, self.device), forward_only=False)

    def held_out_loss(self, batches: int) -> float:
        """Mean loss per token of the first `batches` held-out global batches, in the recipe's precision.

        Under delayed scaling the forward pass adds to the live amax: call it after the last checkpoint.
        """
        self.model.eval()
        reports = []
        with torch.no_grad():
            for index in range(batches):
                numbers = index * self.plan.global_batch_size
                micro_batches = self.plan.step(self.dataset.held_out, numbers, self.device)
                reports += self._run(micro_batches, forward_only=True)
        self.model.train()
        return reduce_loss(reports, self.device)[0]

    def _run(self, micro_batches: Iterator[Micro], *, forward_only: bool) -> list[torch.Tensor]:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        reports: list[torch.Tensor] = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=micro_batches,
            model=[self.model],
            num_microbatches=self.plan.micro_batches,
            seq_length=self.seq_length,
            micro_batch_size=self.plan.micro_batch_size,
            decoder_seq_length=self.seq_length,
            forward_only=forward_only,
        )
        return reports
