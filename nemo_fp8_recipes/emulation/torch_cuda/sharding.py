"""`fully_shard` (FSDP2) of a model on the posing device.

It compares a parameter's device with the mesh's, and a parameter says that it is on the host.
"""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nemo_fp8_recipes.emulation.import_hook import after_import
from nemo_fp8_recipes.emulation.ledger import PatchLedger

if TYPE_CHECKING:
    import torch

__all__ = ["apply"]

_PARAMETERS = "torch.distributed.fsdp._fully_shard._fsdp_param"
_REASON = "parameters on the posing device are the host's, which FSDP refuses"


def apply(ledger: PatchLedger) -> None:
    """Let FSDP take what is on the posing device, whether it has been imported or not."""
    accept = functools.partial(_accept_posing, ledger)
    if _PARAMETERS in sys.modules:
        accept(sys.modules[_PARAMETERS])
    else:
        after_import(ledger, _PARAMETERS, accept, _REASON)


def _accept_posing(ledger: PatchLedger, module: ModuleType) -> None:
    sharded = vars(module)["FSDPParam"]
    original = vars(sharded)["_init_sharded_param"]

    @functools.wraps(original)
    def _init_sharded_param(self: Any, param: torch.Tensor, device: torch.device, *rest: Any) -> Any:
        posing = device.type == "cuda" and param.device.type == "cpu"
        return original(self, param, param.device if posing else device, *rest)

    ledger.set(sharded, original.__name__, _init_sharded_param, _REASON)
