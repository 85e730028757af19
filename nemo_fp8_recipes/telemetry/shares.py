"""Which elements of a parameter's high-precision copy this rank has, where ranks share it.

Megatron's distributed optimizer lays the parameters of a bucket one behind the other and cuts that into as
many runs as there are data-parallel ranks, wherever the cut falls; a copy of a part says how long it is and
not where it begins. The buffers that the optimizer has this from belong to the model's wrapper
(`megatron/core/distributed/param_and_grad_buffer.py`, `DistributedOptimizer._build_model_gbuf_range`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from nemo_fp8_recipes.injection.peers import derives_from
from nemo_fp8_recipes.telemetry.seam import quantized_kinds

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Share", "shares"]

_READ = ("param_index_map", "buckets", "data_parallel_group")


class Share(NamedTuple):
    """A run of a parameter's elements, counted row by row.

    Attributes:
        first, last: the first element, and the one behind the last.
        group: the lowest of the ranks that share the parameter, counted over all of them: it tells them from
            the ranks that share another shard or replica of it.
    """

    first: int
    last: int
    group: int


def shares(model: nn.Module | Sequence[nn.Module]) -> Iterator[tuple[Any, Share]]:
    """The quantised parameters of which this rank has a share, and that.

    Args:
        model: the model with its wrapper, or Megatron's list of virtual-pipeline chunks. Without Megatron's
            wrapper, and with one that keeps its buffers otherwise, there are none.
    """
    from torch import nn

    for chunk in (model,) if isinstance(model, nn.Module) else model:
        for module in chunk.modules():
            if not derives_from(module, "megatron", "DistributedDataParallel"):
                continue
            wrapper: Any = module
            for buffer in (*wrapper.buffers, *wrapper.expert_parallel_buffers):
                if all(hasattr(buffer, name) for name in _READ):
                    yield from _of_buffer(buffer)


def _of_buffer(buffer: Any) -> Iterator[tuple[Any, Share]]:
    import torch.distributed as dist

    group = buffer.data_parallel_group
    lowest = dist.get_process_group_ranks(group)[0]
    for parameter, (start, end, bucket_index, *_) in buffer.param_index_map.items():
        if not quantized_kinds[type(parameter)]:
            continue
        bucket = buffer.buckets[bucket_index]
        length = bucket.grad_data.numel() // group.size()
        mine = bucket.offset + group.rank() * length
        first, last = max(start, mine), min(end, mine + length)
        if first < last:
            yield parameter, Share(first - start, last - start, lowest)
