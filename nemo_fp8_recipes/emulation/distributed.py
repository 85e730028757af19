"""torch.distributed for code written for NCCL: gloo takes its place, in as many processes as there are."""

# ruff: noqa: ARG001 -- the signatures are torch's

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from nemo_fp8_recipes.emulation.ledger import PatchLedger

__all__ = ["apply"]


def apply(ledger: PatchLedger) -> None:
    """Replace NCCL by gloo wherever a backend is named, and the coalescing of collectives that gloo lacks."""
    reason = "NCCL needs CUDA"

    init_process_group = dist.init_process_group

    @functools.wraps(init_process_group)
    def redirected_init(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("device_id", None)
        kwargs.pop("pg_options", None)
        init_process_group(_host_backend(backend), *args, **kwargs)

    new_group = dist.new_group

    @functools.wraps(new_group)
    def redirected_new_group(
        ranks: Any = None,
        timeout: Any = None,
        backend: Any = None,
        pg_options: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        kwargs.pop("device_id", None)
        return new_group(ranks, timeout, _host_backend(backend), None, *args, **kwargs)

    barrier = dist.barrier

    @functools.wraps(barrier)
    def redirected_barrier(group: Any = None, async_op: bool = False, device_ids: Any = None) -> Any:
        return barrier(group, async_op)

    def is_nccl_available() -> bool:
        return True  # its name is: programs assert this before they ask for it

    for name, function in (
        ("init_process_group", redirected_init),
        ("new_group", redirected_new_group),
        ("barrier", redirected_barrier),
    ):
        ledger.set(dist, name, function, reason)
        ledger.set(c10d, name, function, reason)
    # Not torch's own name for it, in `distributed_c10d`: it looks for NCCL's classes after asking.
    ledger.set(dist, "is_nccl_available", is_nccl_available, reason)
    for name in _ALL_GATHERS:
        if hasattr(dist, name):
            gather = _without_autograd(getattr(dist, name))
            ledger.set(dist, name, gather, "gloo writes to the output through autograd, NCCL to its memory")
            ledger.set(c10d, name, gather, "gloo writes to the output through autograd, NCCL to its memory")
    coalescing = "gloo cannot coalesce collectives; they run one after the other"
    ledger.set(dist, "_coalescing_manager", _coalescing_manager, coalescing)
    ledger.set(c10d, "_coalescing_manager", _coalescing_manager, coalescing)


_ALL_GATHERS = ("all_gather_into_tensor", "all_gather_single", "_all_gather_base")


def _without_autograd(gather: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(gather)
    def detached(output_tensor: torch.Tensor, input_tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return gather(output_tensor.detach(), input_tensor.detach(), *args, **kwargs)

    return detached


def _host_backend(backend: Any) -> Any:
    if backend is None:
        return None
    names = [part.split(":", 1)[-1] for part in str(backend).lower().split(",")]
    return "gloo" if "nccl" in names else backend


@contextmanager
def _coalescing_manager(
    group: Any = None,
    device: torch.device | None = None,
    async_ops: bool = False,
) -> Iterator[c10d._CoalescingManager]:
    """As torch's manager of this name, but the collectives recorded in the block are started one by one.

    Torch records `all_reduce`, `all_gather_into_tensor` and `reduce_scatter_tensor` instead of running them
    while a group has an entry in `pg_coalesce_state`, and returns works that must not be waited for. With
    `async_ops` the caller waits through the manager.
    """
    group = group or c10d._get_default_group()
    recorded = c10d._world.pg_coalesce_state.setdefault(group, [])
    if recorded:
        raise ValueError("ProcessGroup has non-empty op list at the start of coalescing")
    manager = c10d._CoalescingManager()
    try:
        yield manager
    finally:
        recorded = c10d._world.pg_coalesce_state.pop(group)
    for call in recorded:
        tensors = (call.tensor,) if call.dst_tensor is None else (call.dst_tensor, call.tensor)
        options = {} if call.redop is None else {"op": call.redop}
        manager.append(call.op(*tensors, **options, group=group, async_op=True))
    if not async_ops:
        manager.wait()
