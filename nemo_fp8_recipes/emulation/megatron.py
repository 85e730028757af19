"""What Megatron-Core needs beyond torch.cuda: its functions that are compiled with torch.compile run
uncompiled.

Compiling them takes a C++ compiler, which a machine that only emulates need not have, and tens of seconds at
the first step; the functions are element-wise and gain nothing at emulated sizes. `torch.compile` itself is
left alone.
"""

from __future__ import annotations

import sys
from types import ModuleType

from nemo_fp8_recipes.emulation.import_hook import after_import
from nemo_fp8_recipes.emulation.ledger import PatchLedger
from nemo_fp8_recipes.errors import EmulationError

__all__ = ["apply", "require_not_imported"]


def require_not_imported() -> None:
    """Raise `EmulationError` when Megatron-Core was imported before the device: it decides at import whether
    Transformer Engine is there."""
    if "megatron.core" in sys.modules:
        raise EmulationError(
            "Megatron-Core is imported already; the emulated device must be installed before it.",
            hint="Call nemo_fp8_recipes.emulation.install() first, or start the program with "
            "python -m nemo_fp8_recipes.emulation.",
        )


def apply(ledger: PatchLedger) -> None:
    """Arrange that Megatron-Core's `jit_fuser` leaves functions as they are."""
    after_import(ledger, "megatron.core.jit", _no_jit_fuser, "torch.compile needs a C++ compiler and time")


def _no_jit_fuser(module: ModuleType) -> None:
    module.disable_jit_fuser()
