"""The GPUs that the emulated device can pose as, and what torch reports about each.

The names are those of `conf/hardware/`. Compute capabilities: NVIDIA's list of CUDA GPUs; multiprocessors,
caches and memory: the product data sheets and whitepapers, with memory in the units that the product name
uses. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from nemo_fp8_recipes.errors import EmulationError, nearest

__all__ = ["DEVICES", "DeviceProperties", "EmulatedDevice", "device"]

_MIB = 2**20
_GIB = 2**30


@dataclass(frozen=True)
class DeviceProperties:
    """`torch.cuda.get_device_properties()` of a posing GPU: every attribute that CUDA builds of torch give.

    Transformer Engine reads `major`, `minor` and `multi_processor_count`; torch.compile's inductor also reads
    `gcnArchName`, `regs_per_multiprocessor`, `max_threads_per_multi_processor` and `warp_size`.
    """

    name: str
    major: int
    minor: int
    total_memory: int
    multi_processor_count: int
    L2_cache_size: int
    shared_memory_per_block_optin: int
    shared_memory_per_multiprocessor: int
    max_threads_per_multi_processor: int
    gcnArchName: str
    regs_per_multiprocessor: int = 65536
    shared_memory_per_block: int = 48 * 1024
    max_threads_per_block: int = 1024
    warp_size: int = 32
    memory_bus_width: int = 0
    memory_clock_rate: int = 0
    clock_rate: int = 0
    is_integrated: int = 0
    is_multi_gpu_board: int = 0
    pci_bus_id: int = 0
    pci_device_id: int = 0
    pci_domain_id: int = 0
    uuid: str = "00000000-0000-0000-0000-000000000000"


@dataclass(frozen=True)
class EmulatedDevice:
    """One GPU to pose as.

    Attributes:
        name: what `hardware=` and `install()` take.
        display_name: what people call it.
        product_name: what `torch.cuda.get_device_name()` says on the real one.
        compute_capability: (major, minor).
        memory_gb: memory of one GPU, as its data sheet counts.
        multiprocessors: streaming multiprocessors that are enabled.
        l2_cache_mb: level-2 cache, MiB.
    """

    name: str
    display_name: str
    product_name: str
    compute_capability: tuple[int, int]
    memory_gb: int
    multiprocessors: int
    l2_cache_mb: int
    emulated: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        if self.memory_gb <= 0 or self.multiprocessors <= 0:
            raise ValueError(f"{self.name}: memory_gb and multiprocessors are positive.")

    @property
    def label(self) -> str:
        """What every record says: "emulated h100"."""
        return f"emulated {self.name}"

    @property
    def properties(self) -> DeviceProperties:
        """What `torch.cuda.get_device_properties()` returns; its name says that it is emulated."""
        major, minor = self.compute_capability
        # Limits per architecture: CUDA C++ programming guide, "Technical specifications per compute
        # capability".
        shared_kib = {(8, 0): 164, (8, 9): 100, (12, 0): 100, (12, 1): 100}.get(self.compute_capability, 228)
        name = f"{self.product_name} (emulated)"
        return DeviceProperties(
            name=name,
            major=major,
            minor=minor,
            total_memory=self.memory_gb * _GIB,
            multi_processor_count=self.multiprocessors,
            L2_cache_size=self.l2_cache_mb * _MIB,
            shared_memory_per_block_optin=(shared_kib - 1) * 1024,
            shared_memory_per_multiprocessor=shared_kib * 1024,
            max_threads_per_multi_processor=1536 if (major, minor) == (8, 9) or major == 12 else 2048,
            gcnArchName=name,
        )


_TABLE = (
    EmulatedDevice("a100", "A100", "NVIDIA A100-SXM4-80GB", (8, 0), 80, 108, 40),
    EmulatedDevice("l40s", "L40S", "NVIDIA L40S", (8, 9), 48, 142, 96),
    EmulatedDevice("h100", "H100", "NVIDIA H100 80GB HBM3", (9, 0), 80, 132, 50),
    EmulatedDevice("h200", "H200", "NVIDIA H200", (9, 0), 141, 132, 50),
    EmulatedDevice("gh200", "GH200", "NVIDIA GH200 480GB", (9, 0), 96, 132, 50),
    EmulatedDevice("b200", "B200", "NVIDIA B200", (10, 0), 180, 148, 126),
    EmulatedDevice("gb200", "GB200", "NVIDIA GB200", (10, 0), 186, 152, 126),
    EmulatedDevice("b300", "B300", "NVIDIA B300 SXM6 AC", (10, 3), 270, 148, 126),
    EmulatedDevice("gb300", "GB300", "NVIDIA GB300", (10, 3), 278, 152, 126),
    EmulatedDevice(
        "rtx_pro_6000", "RTX PRO 6000", "NVIDIA RTX PRO 6000 Blackwell Server Edition", (12, 0), 96, 188, 128
    ),
    EmulatedDevice("dgx_spark", "DGX Spark", "NVIDIA GB10", (12, 1), 128, 48, 24),
)

DEVICES: Mapping[str, EmulatedDevice] = MappingProxyType({entry.name: entry for entry in _TABLE})
"""Name -> GPU."""


def device(name: str) -> EmulatedDevice:
    """The GPU of this name. Raises `EmulationError` naming the known ones."""
    try:
        return DEVICES[name]
    except KeyError:
        close = nearest(name, DEVICES)
        raise EmulationError(
            f"There is no GPU called {name!r} to pose as.",
            key="hardware",
            value=name,
            allowed=DEVICES,
            hint=f"Did you mean {close}?" if close else None,
        ) from None
