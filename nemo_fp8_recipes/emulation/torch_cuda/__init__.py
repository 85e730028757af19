"""torch.cuda on a machine with no GPU: what code that expects one asks of torch, answered for the posing
device.

One concern a file; every change goes through a `PatchLedger`, with its reason:

    queries.py      is there a device, which one, what are its properties
    streams.py      streams, events, capture state, NVTX: work is done when it is issued, so waiting is free
    runtime.py      the profiler's switch, return codes, warnings of synchronisation, cuDNN's version
    memory.py       allocator statistics and cache control
    random.py       the device's random state, which is the host's
    autocast.py     the device's autocast, which acts on the host's tensors
    matmul.py       16-bit matrix products, accumulated in FP32 as tensor cores do
    device_type.py  `torch.device(0)` is the posing device
    operators.py    custom operators for the device run on its tensors
    sharding.py     `fully_shard` of what is on the device
    flat_sharding.py  `FullyShardedDataParallel` of it
    placement.py    `device="cuda"` makes a host tensor, and host tensors say that they are on the device
"""

from __future__ import annotations

from nemo_fp8_recipes.emulation.devices import EmulatedDevice
from nemo_fp8_recipes.emulation.ledger import PatchLedger
from nemo_fp8_recipes.emulation.torch_cuda import (
    autocast,
    device_type,
    flat_sharding,
    matmul,
    memory,
    operators,
    placement,
    queries,
    random,
    runtime,
    sharding,
    streams,
)

__all__ = ["apply"]


def apply(ledger: PatchLedger, device: EmulatedDevice) -> None:
    """Make torch answer as if it ran on `device`."""
    device_type.apply(ledger)
    placement.apply(ledger)
    operators.apply(ledger)
    queries.apply(ledger, device)
    streams.apply(ledger)
    runtime.apply(ledger)
    memory.apply(ledger, device)
    random.apply(ledger)
    autocast.apply(ledger)
    matmul.apply(ledger)
    sharding.apply(ledger)
    flat_sharding.apply(ledger)
