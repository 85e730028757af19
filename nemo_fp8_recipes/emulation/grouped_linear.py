"""`GroupedLinear(use_grouped_tensor=True)` asks whether the numbers of tokens are on the device.

Transformer Engine refuses a `m_splits` of the host there (`pytorch/module/grouped_linear.py`), by
`Tensor.device`, which tells the truth on the emulated device: the host. A tensor is handed on as one of the
device; a list is not, and is refused as on a GPU.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from nemo_fp8_recipes.emulation.import_hook import after_import
from nemo_fp8_recipes.emulation.ledger import PatchLedger

__all__ = ["apply"]


def apply(ledger: PatchLedger) -> None:
    """Wrap `GroupedLinear.forward` when its module is imported."""
    after_import(
        ledger,
        "transformer_engine.pytorch.module.grouped_linear",
        _wrap,
        "the numbers of tokens have to be on the device, where every tensor is",
    )


def _wrap(module: types.ModuleType) -> None:
    import torch

    forward = module.GroupedLinear.forward

    @functools.wraps(forward)
    def on_device(self: Any, inp: Any, m_splits: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(m_splits, torch.Tensor) and getattr(self, "use_grouped_tensor", False):
            m_splits = m_splits.to(torch.int64).as_subclass(_on_device())
        return forward(self, inp, m_splits, *args, **kwargs)

    module.GroupedLinear.forward = on_device


@functools.cache
def _on_device() -> Any:
    import torch

    class OnDevice(torch.Tensor):
        """A host tensor that says that it is on the device; what is computed from it does not."""

        device = property(lambda _self: torch.device("cuda", 0))

    kind: Any = OnDevice
    kind.__torch_function__ = torch._C._disabled_torch_function_impl

    return kind
