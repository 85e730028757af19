"""How checkpoint files are written: Megatron's torch_dist strategy, in threads of this process.

Megatron writes from forked processes and collects their results in a manager process. For a save that is
waited for, threads do the same, without forking a process that holds a GPU and open connections, without
importing the program anew in the manager (seconds, and 280 MB), and without a manager that outlives a job
which is killed."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
    from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy

__all__ = ["save_strategy"]


def save_strategy() -> SaveShardedStrategy:
    """Writes what this rank is the main owner of; data-parallel ranks share out what they hold in common."""
    strategy = _ThreadedSave("torch_dist", 1)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return strategy if dist.get_world_size(group) == 1 else FullyParallelSaveStrategyWrapper(strategy, group)


class _ThreadedSave(TorchDistSaveShardedStrategy):
    def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        with _results_in_this_process():
            super().save(sharded_state_dict, checkpoint_dir)

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> AsyncRequest:
        request = super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret)
        if request.async_fn is None:  # nothing to write on this rank
            return request
        transforms = [writer.transforms] if hasattr(writer, "transforms") else []
        return request._replace(async_fn=partial(_write, transforms))


@contextmanager
def _results_in_this_process() -> Iterator[None]:
    """Give Megatron's writer a plain queue where it would start a manager process for one."""
    before = filesystem_async._results_queue
    filesystem_async._results_queue = queue.Queue()
    try:
        yield
    finally:
        filesystem_async._results_queue = before


def _write(transforms: list[Any], rank: int, buckets: list[Any], results: queue.Queue[Any]) -> None:
    """Write each bucket to its file; `results` gets {bucket number: write results} or the first exception."""
    del rank
    written: queue.Queue[tuple[int, Any]] = queue.Queue()
    with ThreadPoolExecutor(max_workers=max(1, len(buckets))) as pool:
        for number, bucket in enumerate(buckets):
            pool.submit(_write_bucket, transforms, number, bucket, written)
    found = dict(written.get_nowait() for _ in buckets)
    failures = [result for result in found.values() if isinstance(result, Exception)]
    results.put(failures[0] if failures else dict(sorted(found.items())))


def _write_bucket(
    transforms: list[Any], number: int, bucket: Any, written: queue.Queue[tuple[int, Any]]
) -> None:
    running: queue.Queue[int] = queue.Queue()  # the protocol by which Megatron counts its processes
    running.put(number)
    FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, written, running, use_fsync=True)
