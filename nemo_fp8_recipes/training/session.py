"""The part of the job that runs on torch: processes, run directory, model, steps, and what is left at the
end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from nemo_fp8_recipes import telemetry
from nemo_fp8_recipes.callbacks.megatron_core import Fp8Run
from nemo_fp8_recipes.training import display
from nemo_fp8_recipes.training.alert_actions import AlertActions, load_callback
from nemo_fp8_recipes.training.checkpoint import directory as directories
from nemo_fp8_recipes.training.checkpoint.checkpointer import Checkpointer, Position, verify
from nemo_fp8_recipes.training.data import BatchPlan, Dataset
from nemo_fp8_recipes.training.distributed import process_group, seed_everything
from nemo_fp8_recipes.training.files import atomic_write_json
from nemo_fp8_recipes.training.forward import Forward
from nemo_fp8_recipes.training.interruption import watch_signals
from nemo_fp8_recipes.training.invocation import Invocation
from nemo_fp8_recipes.training.job_data import load_dataset
from nemo_fp8_recipes.training.job_record import End, JobRecord
from nemo_fp8_recipes.training.model import (
    build_gpt,
    count_parameters,
    transformer_config,
    wrap,
)
from nemo_fp8_recipes.training.optimizer import build_optimizer, build_scheduler
from nemo_fp8_recipes.training.peer_warnings import ignore_known_warnings
from nemo_fp8_recipes.training.run_directory import CHECKPOINTS, MANIFEST_FILE, MANIFESTS
from nemo_fp8_recipes.training.settings import Settings
from nemo_fp8_recipes.training.trainer import Trainer

if TYPE_CHECKING:
    from rich.console import Console

    from nemo_fp8_recipes.telemetry.recorder import Recorder

__all__ = ["run_session"]


def run_session(settings: Settings, invocation: Invocation) -> int:
    """Train; returns the exit status: 0, or 128 + the signal that stopped the job."""
    ignore_known_warnings(emulated=invocation.emulated)
    timeout = settings.training.distributed_timeout_minutes
    with process_group(settings.parallel, on_gpu=not invocation.emulated, timeout_minutes=timeout) as device:
        session = _Session(settings, invocation, device)
        return session.run()


class _Session:
    def __init__(self, settings: Settings, invocation: Invocation, device: torch.device) -> None:
        self.settings = settings
        self.invocation = invocation
        self.sizes = settings.parallel
        self.device = device
        self.is_first_rank = dist.get_rank() == 0
        self.console: Console = display.make_console(quiet=not self.is_first_rank)
        self.alert_actions = AlertActions(load_callback(settings.alerts.callback), switches=True)
        self.recorder: Recorder | None = None  # once the model is built, unless telemetry is off

    # -- the order of things -----------------------------------------------------------------------------

    def run(self) -> int:
        with ExitStack() as stack:
            dataset = load_dataset(self.settings, self.invocation)
            record = JobRecord.open(
                stack,
                self.settings,
                self.invocation,
                self.console,
                newest=directories.newest_checkpoint,
                look=lambda checkpoint: directories.read_marker(checkpoint).step,
            )
            job = self.settings.job_identity(
                data_fingerprint=dataset.fingerprint, world_size=dist.get_world_size()
            )
            if record.checkpoint is not None:
                verify(record.checkpoint, job)
            with record.failing():
                dataset.prepare(record.path)
                return self._train(dataset, record, job)

    def _train(self, dataset: Dataset, record: JobRecord, job: dict[str, Any]) -> int:
        settings = self.settings
        with (
            watch_signals() as interruption,
            Fp8Run(
                settings.recipe,
                telemetry=self._telemetry(record.path),
                schedule=settings.schedule,
                modules=settings.modules,
            ) as fp8_run,
        ):
            trainer = self._build(dataset, record, job, fp8_run)
            checkpointer, checkpoint = trainer.checkpointer, record.checkpoint
            start = checkpointer.load(checkpoint) if checkpoint is not None else Position()
            record.begin()
            fp8_run.model_built(trainer.model, steps_done=start.step)
            if self.recorder is not None and record.going_on is not None:
                self.recorder.truncate_after(start.step)
            record.show_banner(
                dataset, processes=dist.get_world_size(), parameters=count_parameters(checkpointer.model)
            )
            total = settings.training.steps
            with display.progress(self.console, total=total, done=start.step) as line:
                outcome = trainer.run(start, interruption, line)
            if self.recorder is not None:
                # On every rank together: closing waits for no other one, and would leave out what a rank read
                # for the first time in the last step.
                self.recorder.flush()
            held_out = None
            if outcome.finished and settings.training.eval_batches:
                held_out = trainer.forward.held_out_loss(settings.training.eval_batches)
        end = End(
            outcome.position.step,
            held_out=held_out,
            signal=outcome.signal,
            rule=outcome.rule,
            lost=self.recorder.lost if self.recorder is not None else None,
        )
        record.end(end)
        return end.status

    # -- before the first step ---------------------------------------------------------------------------

    def _build(self, dataset: Dataset, record: JobRecord, job: dict[str, Any], fp8_run: Fp8Run) -> Trainer:
        from megatron.core.distributed import finalize_model_grads

        settings, model, training = self.settings, self.settings.model, self.settings.training
        data_ranks = self.sizes.data_parallel(dist.get_world_size())
        plan = BatchPlan(training.global_batch_size, training.micro_batch_size, _data_rank(), data_ranks)
        seed_everything(training.seed)
        config = transformer_config(
            model,
            settings.recipe,
            self.sizes,
            settings.megatron,
            emulated=self.invocation.emulated,
            deterministic=training.deterministic,
        )
        fp8_run.check(config)
        gpt = build_gpt(model, config)
        wrapped = wrap(
            gpt, settings.optimizer, fp8_param=bool(config.fp8 and config.fp8_param), device=self.device
        )
        optimizer = build_optimizer(settings.optimizer, wrapped)
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = optimizer.scale_loss
        if settings.optimizer.overlap_grad_reduce:
            config.no_sync_func = wrapped.no_sync
        scheduler = build_scheduler(settings.optimizer, optimizer, total_steps=training.steps)
        checkpointer = Checkpointer(
            checkpoints=record.path / CHECKPOINTS,
            model=gpt,
            optimizer=optimizer,
            scheduler=scheduler,
            schedule=settings.schedule,
            device=self.device,
            job=job,
            versions=dict(self.invocation.versions),
            keep=training.keep_checkpoints,
        )

        read: dict[int, dict[str, Any]] = {}

        def write_manifest(step: int) -> None:
            if not self.is_first_rank or fp8_run.manifest is None:
                return
            read[step] = document = fp8_run.manifest.to_dict()
            if settings.schedule.spans or len(read) > 1:  # the recipe changes, or has changed
                manifests = record.path / MANIFESTS
                manifests.mkdir(exist_ok=True)
                for first in read:
                    atomic_write_json(manifests / f"step_{first:08d}.json", read[first])
            atomic_write_json(record.path / MANIFEST_FILE, document)

        return Trainer(
            settings=training,
            model=wrapped,
            forward=Forward(wrapped, dataset, plan, model.seq_length, self.device),
            optimizer=optimizer,
            scheduler=scheduler,
            fp8_run=fp8_run,
            checkpointer=checkpointer,
            log=record.log,
            proven=write_manifest,
            before_save=lambda: self.recorder.flush() if self.recorder is not None else None,
            alerts=self.alert_actions,
        )

    def _telemetry(self, path: Path) -> Callable[[Any], Recorder] | None:
        """How `Fp8Run` attaches telemetry to the built model; None when it is switched off."""
        settings = self.settings.telemetry
        if not settings.enabled:
            return None

        def attach(model: torch.nn.Module) -> Recorder:
            self.recorder = telemetry.attach(
                model,
                self.settings.recipe,
                directory=path,
                log_every=settings.log_every,
                stats_every=settings.stats_every,
                whatif=settings.whatif,
                sinks=settings.sinks,
                history=settings.history,
                flush_every=settings.flush_every,
                device=self.invocation.device_label,
                alerts=self.settings.alerts,
                on_alert=self.alert_actions if self.settings.alerts.acts else None,
            )
            return self.recorder

        return attach


def _data_rank() -> int:
    from megatron.core import parallel_state

    return int(parallel_state.get_data_parallel_rank())
