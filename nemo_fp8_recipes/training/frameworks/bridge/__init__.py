"""`nemo-fp8 train framework=bridge`: the job through Megatron-Bridge's `pretrain()`."""

from __future__ import annotations

from nemo_fp8_recipes.training.frameworks.bridge.session import run_session

__all__ = ["run_session"]
