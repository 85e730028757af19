"""The job through NeMo's `nl.Trainer`, leaving the run directory that the reference job leaves.

NeMo starts torch.distributed itself. What has to be agreed before, the run directory and the checkpoint to go
on from, is agreed in a group of its own that is gone when NeMo starts.
"""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nemo.lightning as nl
import torch.distributed as dist
from nemo.utils import logging as nemo_logging

from nemo_fp8_recipes.callbacks.nemo import Fp8RecipeCallback, precision_plugin
from nemo_fp8_recipes.training import display
from nemo_fp8_recipes.training.alert_actions import AlertActions, load_callback
from nemo_fp8_recipes.training.checkpoint import directory as directories
from nemo_fp8_recipes.training.data import Dataset
from nemo_fp8_recipes.training.frameworks.nemo import parts
from nemo_fp8_recipes.training.frameworks.nemo.bookkeeping import Bookkeeping
from nemo_fp8_recipes.training.interruption import watch_signals
from nemo_fp8_recipes.training.invocation import Invocation
from nemo_fp8_recipes.training.job_data import load_dataset
from nemo_fp8_recipes.training.job_record import JobRecord
from nemo_fp8_recipes.training.peer_warnings import ignore_known_warnings
from nemo_fp8_recipes.training.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["run_session"]


def run_session(settings: Settings, invocation: Invocation) -> int:
    """Train; returns the exit status: 0, or 128 + the signal that stopped the job."""
    parts.check_supported(settings)
    ignore_known_warnings(emulated=invocation.emulated)
    nemo_logging.setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with ExitStack() as stack:
        return _Session(settings, invocation).run(stack)


class _Session:
    def __init__(self, settings: Settings, invocation: Invocation) -> None:
        self.settings = settings
        self.invocation = invocation
        self.processes = int(os.environ.get("WORLD_SIZE", "1"))
        self.console: Console = display.make_console(quiet=int(os.environ.get("RANK", "0")) != 0)
        self.alert_actions = AlertActions(load_callback(settings.alerts.callback))

    def run(self, stack: ExitStack) -> int:
        with _before_nemo(self.settings.training.distributed_timeout_minutes):
            dataset = load_dataset(self.settings, self.invocation)
            job = self.settings.job_identity(data_fingerprint=dataset.fingerprint, world_size=self.processes)
            record = JobRecord.open(
                stack,
                self.settings,
                self.invocation,
                self.console,
                newest=directories.newest_checkpoint,
                look=lambda checkpoint: _step_of_this_job(checkpoint, job),
            )
            with record.failing():
                dataset.prepare(record.path)
                record.begin()
        try:
            with record.failing():
                return self._train(dataset, record, job)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    def _train(self, dataset: Dataset, record: JobRecord, job: dict[str, Any]) -> int:
        settings, invocation = self.settings, self.invocation
        telemetry, training = settings.telemetry, settings.training
        record.show_banner(
            dataset, processes=self.processes, framework="NeMo 2: nl.Trainer with MegatronStrategy"
        )
        recipe_callback = Fp8RecipeCallback(
            settings.recipe,
            run_dir=record.path,
            telemetry=telemetry.enabled,
            log_every=telemetry.log_every,
            stats_every=telemetry.stats_every,
            whatif=telemetry.whatif,
            sinks=telemetry.sinks,
            loggers=False,
            history=telemetry.history,
            flush_every=telemetry.flush_every,
        )
        recipe_callback.keeps_metrics = False
        recipe_callback.alerts = settings.alerts
        recipe_callback.on_alert = self.alert_actions if settings.alerts.acts else None
        model = parts.build_model(settings, emulated=invocation.emulated)
        data = parts.DataModule(settings, dataset)
        data.resume_after(record.start)
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        with (
            watch_signals() as interruption,
            display.progress(self.console, total=training.steps, done=record.start) as line,
        ):
            bookkeeping = Bookkeeping(
                settings,
                dataset,
                record,
                job=job,
                versions=invocation.versions,
                interruption=interruption,
                alerts=self.alert_actions,
                line=line,
            )
            trainer = nl.Trainer(
                accelerator="gpu",
                devices=local,
                num_nodes=self.processes // local,
                strategy=parts.build_strategy(settings),
                plugins=precision_plugin(
                    settings.recipe, grad_reduce_in_fp32=settings.optimizer.grad_reduce_in_fp32
                ),
                callbacks=[recipe_callback],
                max_steps=training.steps,
                limit_val_batches=0,
                num_sanity_val_steps=0,
                use_distributed_sampler=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                enable_checkpointing=False,
                logger=False,
                log_every_n_steps=1,
            )
            trainer.callbacks.append(bookkeeping)  # NeMo copies its arguments; this one holds a terminal
            parts.build_optimizer(settings).connect(model)
            trainer.fit(model, data, ckpt_path=str(record.checkpoint) if record.checkpoint else None)
        end = bookkeeping.end(lost=recipe_callback.lost)
        record.end(end)
        return end.status


def _step_of_this_job(checkpoint: Path, job: Mapping[str, Any]) -> int:
    """Its step. Raises `CheckpointError` where it is of another job, or damaged."""
    marker = directories.read_marker(checkpoint)
    directories.require_same_job(checkpoint, marker.job, job)
    damage = directories.find_damage(checkpoint, marker.files)
    directories.require_intact(checkpoint, [damage] if damage else [])
    return marker.step


@contextmanager
def _before_nemo(timeout_minutes: int) -> Iterator[None]:
    """A group of all processes on the host, under keys of its own in torchrun's store: NeMo's own group,
    which comes later, finds nothing of it there."""
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, is_master=hosts, timeout=timeout
        )
        prefixed = dist.PrefixStore("nemo_fp8_recipes", store)
        dist.init_process_group("gloo", store=prefixed, rank=rank, world_size=size, timeout=timeout)
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()
