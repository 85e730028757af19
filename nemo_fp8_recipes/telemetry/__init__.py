"""Telemetry: amax, scale and amax history of every quantised tensor, read from Transformer Engine's own
state.

`attach` gives the recorder that a training loop calls around its steps; `store.read` gives back what it
wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from nemo_fp8_recipes.recipes import Recipe
    from nemo_fp8_recipes.telemetry.alerts.alert import Alert
    from nemo_fp8_recipes.telemetry.alerts.schema import AlertsConfig
    from nemo_fp8_recipes.telemetry.recorder import Recorder
    from nemo_fp8_recipes.telemetry.sinks.base import Sink

__all__ = ["attach"]


def attach(
    model: nn.Module | Sequence[nn.Module],
    recipe: Recipe | None = None,
    *,
    directory: str | Path | None = None,
    log_every: int = 10,
    sinks: Iterable[Any] = ("parquet", "tensorboard"),
    more_sinks: Iterable[Sink] = (),
    is_writer: bool | None = None,
    history: bool = True,
    flush_every: int = 10,
    group: Any | None = None,
    device: str | None = None,
    stats_every: int = 100,
    whatif: Iterable[str] = (),
    alerts: AlertsConfig | None = None,
    on_alert: Callable[[tuple[Alert, ...]], None] | None = None,
) -> Recorder:
    """A recorder for `model`. Every rank of `group` calls this, and every method of what it returns.

    Args:
        model: the model, wrapped or not, or Megatron's list of virtual-pipeline chunks.
        recipe: the recipe of the run; bf16 observes nothing, and only training metrics are logged. None: the
            rows alone say by which recipe a tensor was quantised.
        directory: the run directory; None: a new one, `runs/<recipe>-<time>`, see `Recorder.directory`.
        log_every: optimizer steps between two logging steps; step 1 is always one.
        sinks: any of "parquet", "tensorboard", "jsonl", "wandb", "megatron", and objects: a
            `sinks.base.Sink`, a Lightning logger, a SummaryWriter, a W&B run; see docs/telemetry.md.
        more_sinks: sinks of the caller's own, such as a trainer's loggers, on whichever ranks have them.
        is_writer: whether this rank writes; None: rank 0 of `group` does.
        history: store delayed scaling's amax history windows.
        flush_every: logging steps between two flushes.
        group: process group over which values are combined; None: all ranks, if torch.distributed runs.
        device: what the store says it was recorded on, e.g. "emulated b200"; None asks torch.
        stats_every: optimizer steps between two logging steps that read the tensors themselves (underflow,
            saturation, SQNR, ...); step 1 is one. 0: none do.
        whatif: globs over `<module>/<tensor>` ("*.layers.0.*/input") of the tensors that those steps judge
            under every other recipe too.
        alerts: which rules; None: those of conf/alerts/default.yaml.
        on_alert: called with the alerts of a logging step when the next step begins: on every rank, with the
            same alerts, so that it may save a checkpoint, change the recipe or end the loop. Costs one
            broadcast of one number a logging step where there are several ranks.

    Raises:
        ConfigError: no such sink, or an interval out of range.
        RunDirectoryError: another process writes to the directory.
    """
    import torch
    import torch.distributed as dist

    from nemo_fp8_recipes import __version__
    from nemo_fp8_recipes.telemetry.alerts.schema import default_alerts
    from nemo_fp8_recipes.telemetry.alerts.watch import Watch, reduces_amax
    from nemo_fp8_recipes.telemetry.exchange import Exchange
    from nemo_fp8_recipes.telemetry.recorder import Recorder
    from nemo_fp8_recipes.telemetry.schema import TelemetryConfig
    from nemo_fp8_recipes.telemetry.sinks import build
    from nemo_fp8_recipes.training.run_directory import RunDirectory

    given = list(sinks)
    config = TelemetryConfig(
        log_every=log_every,
        stats_every=stats_every,
        whatif=list(whatif),
        sinks=[sink for sink in given if isinstance(sink, str)],
        history=history,
        flush_every=flush_every,
    )
    alerts = alerts if alerts is not None else default_alerts()
    distributed = dist.is_available() and dist.is_initialized()
    if is_writer is None:
        is_writer = not distributed or dist.get_rank(group) == 0
    if device is None:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    said: dict[str, Any] = {} if recipe is None else recipe.to_dict()
    path = Path(directory) if directory is not None else None
    if path is None and is_writer:
        path = RunDirectory.fresh_directory("te" if recipe is None else recipe.name)
    metadata = {
        "recipe": said,
        "device": device,
        "world_size": dist.get_world_size(group) if distributed else 1,
        "rank": dist.get_rank(group) if distributed else 0,
        "version": __version__,
    }
    written = build(given, path, metadata) if is_writer and path is not None else []
    all_sinks = [*written, *more_sinks]
    recorder = Recorder(
        model if recipe is None or recipe.precision != "bf16" else None,
        Exchange(group, writer=is_writer or bool(all_sinks)),
        all_sinks,
        log_every=config.log_every,
        flush_every=config.flush_every,
        history=config.history,
        stats_every=config.stats_every,
        whatif=config.whatif,
        watch=Watch(alerts, amax_reduced=reduces_amax(said), reads_tensors=config.stats_every > 0)
        if is_writer
        else None,
        on_alert=on_alert if alerts.enabled else None,
    )
    recorder.directory = path
    return recorder
