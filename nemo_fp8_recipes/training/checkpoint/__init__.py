"""Checkpoints: Megatron's distributed format, made complete last, loaded without running what is in them.

    step_000200/
        .metadata __0_0.distcp … common.pt metadata.json    Megatron's torch_dist format
        complete.json                                       written last: a directory without it is no
        checkpoint

`directory` finds, verifies and prunes them; `state` says what is in one; `fp8_state` keeps the history and
scales of delayed scaling, which Transformer Engine itself would pickle; `safe_load` restricts what loading
may do."""

from __future__ import annotations

from nemo_fp8_recipes.training.checkpoint.checkpointer import Checkpointer, Position, verify
from nemo_fp8_recipes.training.checkpoint.directory import newest_checkpoint

__all__ = ["Checkpointer", "Position", "newest_checkpoint", "verify"]
