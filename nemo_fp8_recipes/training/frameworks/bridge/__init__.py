"""`nemo-fp8 train framework=bridge`: the job through Megatron-Bridge's `pretrain()`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_fp8_recipes.training.peer_warnings import ignore_known_warnings

if TYPE_CHECKING:
    from nemo_fp8_recipes.training.invocation import Invocation
    from nemo_fp8_recipes.training.settings import Settings

__all__ = ["run_session"]


def run_session(settings: Settings, invocation: Invocation) -> int:
    """Train; returns the exit status: 0, or 128 + the signal that stopped the job."""
    ignore_known_warnings(emulated=invocation.emulated)
    from nemo_fp8_recipes.training.frameworks.bridge import session  # imports Bridge: ten seconds

    return session.run_session(settings, invocation)
