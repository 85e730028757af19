"""From device vectors on every rank to numbers on the writing rank: one collective and one copy a logging
step.

The ranks agree once on a layout (`layout.py`). Each rank writes what it has into its places, in codes whose
order serves every way to combine them (`codec.py`); one all-reduce with the maximum then gives every rank the
whole. When a rank read something the layout does not have yet, and in the first logging step, the ranks
gather their lists anew. Steps of another kind, which read more, have a layout of their own, so that the
others do not carry its empty places.

A process alone has nothing to combine: its numbers go to the host as they are.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_fp8_recipes.telemetry.codec import ABSENT, encode
from nemo_fp8_recipes.telemetry.found import Found
from nemo_fp8_recipes.telemetry.layout import Layout, Plan
from nemo_fp8_recipes.telemetry.probes.base import Reading, ReadingSpec

__all__ = ["Exchange", "InFlight"]

T = TypeVar("T")


class InFlight:
    """Values of one logging step on their way to the host. `result` waits for them."""

    def __init__(
        self,
        exchange: Exchange,
        kind: str,
        reading: Reading | None,
        plan: Plan | None,
        host: Tensor,
        event: Any | None,
    ) -> None:
        self._exchange = exchange
        self._kind = kind
        self._reading = reading
        self._plan = plan
        self._host = host
        self._event = event

    def result(self, *, collective: bool = True) -> Found:
        """What all ranks read in the step: fp32 (length,) for each spec. Empty on ranks that do not write.

        Args:
            collective: whether all ranks call this now. If not, what a rank read for the first time is left
            out.
        """
        if self._event is not None:
            self._event.synchronize()
        host = self._host.numpy()
        unknown = host[0] > 0 if not self._exchange.alone else self._plan is not None and self._plan.unknown
        if unknown and collective:
            return self._exchange.combine_anew(self._reading, self._kind)
        return self._exchange.take(host, self._kind, self._plan)


class Exchange:
    """Combines readings over ranks.

    Args:
        group: process group; None is the default group where torch.distributed runs, else a single process.
        writer: whether this rank wants the result.
    """

    def __init__(self, group: Any | None, *, writer: bool) -> None:
        self._group = group
        self._distributed = dist.is_available() and dist.is_initialized()
        self.world_size = self._world_size = dist.get_world_size(group) if self._distributed else 1
        self.rank = self._rank = dist.get_rank(group) if self._distributed else 0
        self._writer = writer
        self._known: dict[str, set[ReadingSpec]] = {}
        self._last: dict[str, tuple[ReadingSpec, ...]] = {}
        self._layouts: dict[str, Layout] = {}
        self._plans: dict[int, tuple[Layout, Plan]] = {}
        self._source: int | None = None

    @property
    def alone(self) -> bool:
        """There is one rank only."""
        return self._world_size == 1

    def start(self, reading: Reading | None, device: torch.device, *, kind: str = "") -> InFlight:
        """Reduce over ranks and start the copy to the host. Every rank calls this in every logging step, also
        with nothing to show.

        Args:
            reading: what this rank read.
            device: where the model is.
            kind: of the step, the same on every rank; steps of one kind read the same things.
        """
        specs = reading.specs if reading is not None else ()
        if self._last.get(kind) is not specs:
            self._known.setdefault(kind, set()).update(specs)
            self._last[kind] = specs
        layout = self._layouts.get(kind)
        if layout is None:
            layout = self._agree(kind)
        plan = self._plan_for(layout, reading)
        places = self._reduce(layout, reading, plan, device)
        if not self._writer:
            places = places[:1]
        if places.device.type == "cpu" or torch.cuda.is_current_stream_capturing():
            return InFlight(self, kind, reading, plan, places, None)
        host = torch.empty(places.shape, dtype=places.dtype, pin_memory=True)
        host.copy_(places, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return InFlight(self, kind, reading, plan, host, event)

    def combine_anew(self, reading: Reading | None, kind: str) -> Found:
        """Agree on a layout that holds everything, and combine with it. Every rank calls this together."""
        layout = self._agree(kind)
        device = reading.values.device if reading is not None else self._device()
        plan = self._plan_for(layout, reading)
        return self.take(self._reduce(layout, reading, plan, device).cpu().numpy(), kind, plan)

    def same_everywhere(self, value: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
        """The writer's `value` on every rank; collective. Where it is empty, as it mostly is, this costs one
        broadcast of one number; `value` must be picklable.
        """
        if self._world_size == 1:
            return value
        if self._source is None:
            self._source = self._writing_rank(device)
        count = torch.tensor([len(value) if self._writer else 0], dtype=torch.int32, device=device)
        dist.broadcast(count, self._source, group=self._group)
        if not int(count):
            return ()
        given = [value if self._writer else None]
        dist.broadcast_object_list(given, self._source, group=self._group)
        return tuple(given[0] or ())

    def of_all_ranks(self, mine: T) -> list[T]:
        """What each rank has, by rank; collective. `mine` must be picklable."""
        if self._world_size == 1:
            return [mine]
        found: list[Any] = [None] * self._world_size
        dist.all_gather_object(found, mine, group=self._group)
        return found

    def _writing_rank(self, device: torch.device) -> int:
        """The first rank that writes, as torch.distributed counts it. Collective."""
        mine = torch.tensor(
            [self._rank if self._writer else self._world_size], dtype=torch.int32, device=device
        )
        dist.all_reduce(mine, op=dist.ReduceOp.MIN, group=self._group)
        rank = int(mine) % self._world_size  # nobody writes: rank 0 says that there is nothing
        return rank if self._group is None else int(dist.get_global_rank(self._group, rank))

    def take(self, places: np.ndarray, kind: str, plan: Plan | None) -> Found:
        """The values in the places of the layout; specs that no rank had in this step are left out.

        Args:
            places: what `_reduce` made.
            kind: of the step.
            plan: where this rank's numbers went.
        """
        layout = self._layouts.get(kind)
        if layout is None or not self._writer:
            return Found.nothing()
        if self.alone:
            return plan.alone.found(places.view(np.float32)) if plan is not None else Found.nothing()
        return layout.found(places)

    def _agree(self, kind: str) -> Layout:
        known = self._known[kind]
        specs = sorted(known)
        if self._world_size > 1:
            gathered: list[Any] = [None] * self._world_size
            dist.all_gather_object(gathered, specs, group=self._group)
            specs = [ReadingSpec(*spec) for rank in gathered for spec in rank]
        known.update(specs)
        self._layouts[kind] = Layout.of(specs, self._world_size)
        return self._layouts[kind]

    def _reduce(
        self, layout: Layout, reading: Reading | None, plan: Plan | None, device: torch.device
    ) -> Tensor:
        """int32 (places,) on the device: what all ranks have in the places of the layout, in codes. In a
        process alone, the bits of the reading.
        """
        if self.alone and reading is not None and plan is not None:
            return reading.values.view(torch.int32)
        places = torch.full((layout.size,), ABSENT, dtype=torch.int32, device=device)
        if reading is not None and plan is not None:
            values = reading.values
            if not plan.whole:
                values = values.index_select(0, plan.on(device, "source"))
            places.index_copy_(0, plan.on(device, "places"), encode(values, plan.on(device, "minimum")))
            places[:1].copy_(plan.on(device, "flag"))
        if self._world_size > 1:
            dist.all_reduce(places, op=dist.ReduceOp.MAX, group=self._group)
        return places

    def _plan_for(self, layout: Layout, reading: Reading | None) -> Plan | None:
        """Where this rank's numbers go. The same in every step that reads the same."""
        if reading is None:
            return None
        planned = self._plans.get(id(layout))
        if planned is not None and planned[0] is layout:
            known = planned[1].specs
            if known is reading.specs or known == reading.specs:
                return planned[1]
        plan = Plan.of(layout, reading.specs, self._rank)
        # Layouts that were replaced by a larger one go.
        self._plans = {
            id(kept): self._plans[id(kept)] for kept in self._layouts.values() if id(kept) in self._plans
        }
        self._plans[id(layout)] = (layout, plan)
        return plan

    def _device(self) -> torch.device:
        backend = dist.get_backend(self._group) if self._distributed else "gloo"
        return torch.device("cuda") if backend == "nccl" else torch.device("cpu")
