"""What Megatron-Core needs beyond torch.cuda.

Its functions that are compiled with torch.compile run uncompiled: compiling them takes a C++ compiler, which
a machine that only emulates need not have, and tens of seconds at the first step, and element-wise functions
gain nothing from it at emulated sizes. `torch.compile` itself is left alone.

Fused kernels that its configs ask for by default run in Megatron's PyTorch form.

Its random-state tracker warns when the host's state changes inside a block that should only draw on the
device; here the two are one state, which the tracker saves and restores itself.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nemo_fp8_recipes.emulation.import_hook import after_import
from nemo_fp8_recipes.emulation.ledger import PatchLedger
from nemo_fp8_recipes.errors import EmulationError

if TYPE_CHECKING:
    import torch

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
    """Prepare for Megatron-Core's import."""
    after_import(ledger, "megatron.core.jit", _no_jit_fuser, "torch.compile needs a C++ compiler and time")
    after_import(
        ledger,
        "megatron.core.models.common.embeddings.rope_utils",
        _unfused_rope,
        "rotary embeddings are a CUDA kernel where apply_rope_fusion is set",
    )
    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    logger.addFilter(_not_about_one_state)
    ledger.add(
        f"logger {logger.name}",
        "host and device share one random state",
        lambda: logger.removeFilter(_not_about_one_state),
    )


def _no_jit_fuser(module: ModuleType) -> None:
    if hasattr(module, "disable_jit_fuser"):
        module.disable_jit_fuser()
    else:  # Megatron-Core before 0.16; whoever imports the name does so after this
        module.jit_fuser = _as_it_is  # type: ignore[attr-defined]


def _unfused_rope(module: ModuleType) -> None:
    """Where a config asks for the fused kernel, as NeMo's do, Megatron's own PyTorch form runs."""

    def fused_apply_rotary_pos_emb(
        t: torch.Tensor, freqs: torch.Tensor, transpose_output_memory: bool = False, interleaved: bool = False
    ) -> torch.Tensor:
        del transpose_output_memory  # says how the result lies in memory, not what it is
        rotated: torch.Tensor = module._apply_rotary_pos_emb_bshd(t, freqs, rotary_interleaved=interleaved)
        return rotated

    if getattr(module, "fused_apply_rotary_pos_emb", None) is not None:
        module.fused_apply_rotary_pos_emb = fused_apply_rotary_pos_emb  # type: ignore[attr-defined]


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _not_about_one_state(record: logging.LogRecord) -> bool:
    return record.getMessage() != "CPU RNG state changed within GPU RNG context"
