"""Which sequences a data-parallel rank sees in a step, and the batch it makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

__all__ = ["BatchPlan"]


@dataclass(frozen=True)
class BatchPlan:
    """A global batch is `global_batch_size` consecutive sequences, dealt out micro-batch by micro-batch.

    The set of sequences in a step does not depend on the number of ranks, and all ranks of a tensor-,
    pipeline- or context-parallel group (same `data_rank`) see the same ones. That the sizes divide has been
    checked by `layout.check_layout`.
    """

    global_batch_size: int
    micro_batch_size: int
    data_rank: int
    data_ranks: int

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one rank in one step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_ranks)

    def numbers(self, consumed: int, micro_batch: int) -> range:
        """The sequences of this rank's `micro_batch`-th micro-batch after `consumed` sequences of
        training."""
        first = consumed + (micro_batch * self.data_ranks + self.data_rank) * self.micro_batch_size
        return range(first, first + self.micro_batch_size)

    def step(
        self, sequence: Callable[[int], torch.Tensor], consumed: int, device: torch.device | str
    ) -> Iterator[dict[str, torch.Tensor]]:
        """The micro-batches of one step: int64 `tokens`, `labels`, `position_ids`, each [micro batch,
        seq]."""
        for micro_batch in range(self.micro_batches):
            rows = torch.stack([sequence(number) for number in self.numbers(consumed, micro_batch)]).to(
                device
            )
            tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
            positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens).contiguous()
            yield {"tokens": tokens, "labels": labels, "position_ids": positions}
