"""Telemetry: amax, scale and amax history of every quantised tensor, read from Transformer Engine's own
state.

`attach` gives the recorder that a training loop calls around its steps; `store.read` gives back what it
wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from nemo_fp8_recipes.recipes import Recipe
    from nemo_fp8_recipes.telemetry.recorder import Recorder

__all__ = ["attach"]


def attach(
    model: nn.Module | Sequence[nn.Module],
    recipe: Recipe,
    *,
    directory: str | Path,
    log_every: int = 10,
    sinks: Iterable[str] = ("parquet", "tensorboard"),
    is_writer: bool | None = None,
    history: bool = True,
    flush_every: int = 10,
    group: Any | None = None,
    device: str | None = None,
) -> Recorder:
    """A recorder for `model`. Every rank of `group` calls this, and every method of what it returns.

    Args:
        model: the model, wrapped or not, or Megatron's list of virtual-pipeline chunks.
        recipe: the recipe of the run; bf16 observes nothing, and only training metrics are logged.
        directory: the run directory.
        log_every: optimizer steps between two logging steps; step 1 is always one.
        sinks: any of "parquet", "tensorboard", "jsonl".
        is_writer: whether this rank writes; None: rank 0 of `group` does.
        history: store delayed scaling's amax history windows.
        flush_every: logging steps between two flushes.
        group: process group over which values are combined; None: all ranks, if torch.distributed runs.
        device: what the store says it was recorded on, e.g. "emulated b200"; None asks torch.

    Raises:
        ConfigError: no such sink, or an interval below 1.
    """
    import torch
    import torch.distributed as dist

    from nemo_fp8_recipes import __version__
    from nemo_fp8_recipes.telemetry.exchange import Exchange
    from nemo_fp8_recipes.telemetry.recorder import Recorder
    from nemo_fp8_recipes.telemetry.schema import TelemetryConfig
    from nemo_fp8_recipes.telemetry.sinks import build

    config = TelemetryConfig(log_every=log_every, sinks=list(sinks), history=history, flush_every=flush_every)
    distributed = dist.is_available() and dist.is_initialized()
    if is_writer is None:
        is_writer = not distributed or dist.get_rank(group) == 0
    if device is None:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    metadata = {
        "recipe": recipe.to_dict(),
        "device": device,
        "world_size": dist.get_world_size(group) if distributed else 1,
        "rank": dist.get_rank(group) if distributed else 0,
        "version": __version__,
    }
    return Recorder(
        model if recipe.precision != "bf16" else None,
        Exchange(group, writer=is_writer),
        build(config.sinks, Path(directory), metadata) if is_writer else [],
        log_every=config.log_every,
        flush_every=config.flush_every,
        history=config.history,
    )
