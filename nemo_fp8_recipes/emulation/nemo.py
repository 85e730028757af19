"""What NeMo 2 and the Lightning beneath it need beyond torch.cuda and Megatron-Core.

Scripts say `accelerator="gpu", devices=N` as they do on a GPU node. Every process has one posing device of
its own; Lightning wants to count as many as there shall be processes.
"""

from __future__ import annotations

import os
from types import ModuleType

from nemo_fp8_recipes.emulation.import_hook import after_import
from nemo_fp8_recipes.emulation.ledger import PatchLedger

__all__ = ["apply"]

_FABRIC = "lightning.fabric.accelerators.cuda"


def apply(ledger: PatchLedger) -> None:
    """Prepare for Lightning's import."""
    after_import(ledger, _FABRIC, _count_processes, "each process of a node has a posing device of its own")


def _count_processes(module: ModuleType) -> None:
    def num_cuda_devices() -> int:
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    module.num_cuda_devices = num_cuda_devices  # type: ignore[attr-defined]
