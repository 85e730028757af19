"""The job through NeMo's `nl.Trainer`, leaving the run directory that the reference job leaves.

NeMo starts torch.distributed itself. What has to be agreed before, the run directory and the checkpoint to go
on from, is agreed in a group of its own that is gone when NeMo starts.
"""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nemo.lightning as nl
import torch.distributed as dist
from nemo.utils import logging as nemo_logging

from nemo_fp8_recipes.callbacks.nemo import Fp8RecipeCallback, precision_plugin
from nemo_fp8_recipes.report import text
from nemo_fp8_recipes.training import display
from nemo_fp8_recipes.training.checkpoint import directory as directories
from nemo_fp8_recipes.training.data import Dataset, Wanted, build_dataset
from nemo_fp8_recipes.training.distributed import agree, same_everywhere, together
from nemo_fp8_recipes.training.frameworks.nemo import parts
from nemo_fp8_recipes.training.frameworks.nemo.bookkeeping import Bookkeeping
from nemo_fp8_recipes.training.interruption import watch_signals
from nemo_fp8_recipes.training.invocation import Invocation
from nemo_fp8_recipes.training.metrics import MetricsLog, read_metrics
from nemo_fp8_recipes.training.peer_warnings import ignore_known_warnings
from nemo_fp8_recipes.training.resume import open_run
from nemo_fp8_recipes.training.run_directory import METRICS_FILE, RunDirectory
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
        self.is_first_rank = int(os.environ.get("RANK", "0")) == 0
        self.processes = int(os.environ.get("WORLD_SIZE", "1"))
        self.console: Console = display.make_console(quiet=not self.is_first_rank)
        self.run_dir: RunDirectory | None = None  # on rank 0

    def run(self, stack: ExitStack) -> int:
        with _before_nemo(self.settings.training.distributed_timeout_minutes):
            dataset = self._dataset()
            job = self.settings.job_identity(data_fingerprint=dataset.fingerprint, world_size=self.processes)
            path, checkpoint, goes_on = self._open_run(stack, job)
            start = directories.read_marker(checkpoint).step if checkpoint is not None else 0
            dataset.prepare(path)
            self._start_record(path, start, resumed=goes_on)
        try:
            return self._train(dataset, path, checkpoint, start, job)
        except BaseException as error:
            if self.run_dir is not None:
                _record_failure(self.run_dir, error)
            raise
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    # -- before NeMo -------------------------------------------------------------------------------------

    def _dataset(self) -> Dataset:
        model, training = self.settings.model, self.settings.training
        wanted = Wanted(
            train=training.steps * training.global_batch_size,
            held_out=training.eval_batches * training.global_batch_size,
        )
        dataset = together(
            lambda: build_dataset(
                self.settings.data, seq_length=model.seq_length, vocab_size=model.vocab_size, wanted=wanted
            )
        )
        same_everywhere({"data.fingerprint": dataset.fingerprint, **self.invocation.versions})
        return dataset

    def _open_run(self, stack: ExitStack, job: dict[str, Any]) -> tuple[Path, Path | None, bool]:
        """Open the run directory on rank 0 and check what to go on from; every rank learns both."""

        def opened() -> tuple[str, str | None, bool]:
            settings = self.settings
            opening = open_run(settings.run_dir, settings.training.resume, settings.recipe.name)
            self.run_dir = opening.run
            stack.callback(opening.run.close)
            checkpoint = opening.checkpoint
            if checkpoint is not None:
                marker = directories.read_marker(checkpoint)
                directories.require_same_job(checkpoint, marker.job, job)
                damage = directories.find_damage(checkpoint, marker.files)
                directories.require_intact(checkpoint, [damage] if damage else [])
            return str(opening.run.path), str(checkpoint) if checkpoint else None, opening.goes_on

        path, checkpoint, goes_on = agree(opened)
        return Path(path), Path(checkpoint) if checkpoint else None, goes_on

    def _start_record(self, path: Path, start: int, *, resumed: bool) -> None:
        """On rank 0: `run.json` says running, and the metrics after the point of resumption are gone."""
        invocation = self.invocation

        def write() -> None:
            assert self.run_dir is not None
            self.run_dir.start(
                command=invocation.command,
                overrides=invocation.overrides,
                recipe=self.settings.recipe.to_dict(),
                device=invocation.device_label,
                versions=invocation.versions,
                config_yaml=invocation.config_yaml,
                resumed_at=start if resumed else None,
            )
            MetricsLog(path / METRICS_FILE).truncate_after(start)

        agree(write)

    # -- NeMo --------------------------------------------------------------------------------------------

    def _train(
        self, dataset: Dataset, path: Path, checkpoint: Path | None, start: int, job: dict[str, Any]
    ) -> int:
        settings, invocation = self.settings, self.invocation
        telemetry, training = settings.telemetry, settings.training
        self._show_banner(dataset, path, start)
        recipe_callback = Fp8RecipeCallback(
            settings.recipe,
            run_dir=path,
            telemetry=telemetry.enabled,
            log_every=telemetry.log_every,
            sinks=telemetry.sinks,
            loggers=False,
            history=telemetry.history,
            flush_every=telemetry.flush_every,
        )
        recipe_callback.keeps_metrics = False
        recipe_callback.alerts = settings.alerts
        model = parts.build_model(settings, emulated=invocation.emulated)
        data = parts.DataModule(settings, dataset)
        data.resume_after(start)
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        with (
            watch_signals() as interruption,
            display.progress(self.console, total=training.steps, done=start) as line,
        ):
            bookkeeping = Bookkeeping(
                settings,
                dataset,
                path,
                start=start,
                job=job,
                versions=invocation.versions,
                interruption=interruption,
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
            trainer.fit(model, data, ckpt_path=str(checkpoint) if checkpoint is not None else None)
        self._finish(path, bookkeeping)
        return 128 + bookkeeping.signal if bookkeeping.signal else 0

    def _show_banner(self, dataset: Dataset, path: Path, start: int) -> None:
        settings, sizes = self.settings, self.settings.parallel
        model, training = settings.model, settings.training
        versions = self.invocation.versions
        rows = {
            "recipe": settings.recipe.name,
            "framework": "NeMo 2: nl.Trainer with MegatronStrategy",
            "device": self.invocation.device_label,
            "model": f"{model.display_name}: {model.num_layers} layers, hidden {model.hidden_size}, "
            f"{model.num_attention_heads} heads",
            "data": f"{dataset.name}: {dataset.description}",
            "batch": f"{training.global_batch_size} x {model.seq_length} tokens a step",
            "parallelism": f"{self.processes} process(es): tensor {sizes.tp}"
            f"{' with sequence' if sizes.sequence else ''}, pipeline {sizes.pp}, context {sizes.cp}",
            "versions": ", ".join(f"{name} {version or '-'}" for name, version in versions.items()),
            "run directory": str(path),
        }
        if start:
            rows["resumed"] = f"after step {start} of {training.steps}"
        display.banner(self.console, rows)
        for note in self.invocation.notes:
            self.console.print(note, style="yellow", markup=False)

    def _finish(self, path: Path, done: Bookkeeping) -> None:
        if self.run_dir is None:
            return
        rows = read_metrics(path / METRICS_FILE)
        finished = done.step >= self.settings.training.steps
        if finished:
            self.run_dir.finish(
                {
                    "steps": done.step,
                    "first_loss": rows[0]["loss"] if rows else None,
                    "last_loss": rows[-1]["loss"] if rows else None,
                    "held_out_loss": done.held_out,
                }
            )
        else:
            reason = f"by signal {done.signal}" if done.signal else "as asked (training.stop_at_step)"
            self.run_dir.interrupt(f"stopped after step {done.step} {reason}")
            self.console.print(f"Stopped after step {done.step} {reason}.")
        text.render(path, self.console)
        display.farewell(
            self.console,
            path,
            held_out=done.held_out,
            tensorboard=(path / "tensorboard").is_dir(),
            resumable=not finished and self.settings.training.save_every > 0,
        )


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


def _record_failure(run_dir: RunDirectory, error: BaseException) -> None:
    """Say in `run.json` that the run failed; if even that cannot be written, the error says so too."""
    try:
        run_dir.fail(error)
    except Exception as second:  # noqa: BLE001  # the first error is the one to report
        error.add_note(f"{run_dir.path / 'run.json'} could not be updated: {second}")
