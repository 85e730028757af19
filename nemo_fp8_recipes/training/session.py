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
from nemo_fp8_recipes.training.checkpoint.checkpointer import Checkpointer, Position, verify
from nemo_fp8_recipes.training.data import BatchPlan, Dataset, Wanted, build_dataset
from nemo_fp8_recipes.training.distributed import (
    agree,
    process_group,
    same_everywhere,
    seed_everything,
    together,
)
from nemo_fp8_recipes.training.files import atomic_write_json
from nemo_fp8_recipes.training.forward import Forward
from nemo_fp8_recipes.training.interruption import watch_signals
from nemo_fp8_recipes.training.invocation import Invocation
from nemo_fp8_recipes.training.metrics import MetricsLog, read_metrics
from nemo_fp8_recipes.training.model import (
    build_gpt,
    count_parameters,
    transformer_config,
    wrap,
)
from nemo_fp8_recipes.training.optimizer import build_optimizer, build_scheduler
from nemo_fp8_recipes.training.peer_warnings import ignore_known_warnings
from nemo_fp8_recipes.training.resume import open_run
from nemo_fp8_recipes.training.run_directory import (
    CHECKPOINTS,
    MANIFEST_FILE,
    MANIFESTS,
    METRICS_FILE,
    RunDirectory,
)
from nemo_fp8_recipes.training.settings import Settings
from nemo_fp8_recipes.training.trainer import Outcome, Step, Trainer

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
        self.alert_actions = AlertActions(load_callback(settings.alerts.callback))
        self.run_dir: RunDirectory | None = None  # on rank 0
        self.recorder: Recorder | None = None  # once the model is built, unless telemetry is off

    # -- the order of things -----------------------------------------------------------------------------

    def run(self) -> int:
        with ExitStack() as stack:
            dataset = self._dataset()
            path, checkpoint, goes_on = self._open_run(stack)
            job = self.settings.job_identity(
                data_fingerprint=dataset.fingerprint, world_size=dist.get_world_size()
            )
            if checkpoint is not None:
                verify(checkpoint, job)
            try:
                dataset.prepare(path)
                return self._train(dataset, path, checkpoint, job, goes_on=goes_on)
            except BaseException as error:
                if self.run_dir is not None:
                    _record_failure(self.run_dir, error)
                raise

    def _train(
        self, dataset: Dataset, path: Path, checkpoint: Path | None, job: dict[str, Any], *, goes_on: bool
    ) -> int:
        settings = self.settings
        with (
            watch_signals() as interruption,
            Fp8Run(
                settings.recipe,
                telemetry=self._telemetry(path),
                schedule=settings.schedule,
                modules=settings.modules,
            ) as fp8_run,
        ):
            trainer = self._build(dataset, path, job, fp8_run)
            start = trainer.checkpointer.load(checkpoint) if checkpoint is not None else Position()
            self._start_record(path, start, resumed=goes_on)
            fp8_run.model_built(trainer.model, steps_done=start.step)
            if self.recorder is not None and goes_on:
                self.recorder.truncate_after(start.step)
            self._show_banner(trainer, dataset, path, start)
            if goes_on and checkpoint is None:
                self.console.print("The run had saved no checkpoint: it starts again from its first step.")
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
        self._finish(path, outcome, held_out)
        return 128 + outcome.signal if outcome.signal else 0

    # -- before the first step ---------------------------------------------------------------------------

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

    def _open_run(self, stack: ExitStack) -> tuple[Path, Path | None, bool]:
        """Open the run directory on rank 0; every rank learns where it is, what to resume from, and whether
        it holds a run that goes on."""

        def opened() -> tuple[str, str | None, bool]:
            opening = open_run(
                self.settings.run_dir, self.settings.training.resume, self.settings.recipe.name
            )
            self.run_dir = opening.run
            stack.callback(opening.run.close)
            checkpoint = str(opening.checkpoint) if opening.checkpoint else None
            return str(opening.run.path), checkpoint, opening.goes_on

        path, checkpoint, goes_on = agree(opened)
        return Path(path), Path(checkpoint) if checkpoint else None, goes_on

    def _build(self, dataset: Dataset, path: Path, job: dict[str, Any], fp8_run: Fp8Run) -> Trainer:
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
            checkpoints=path / CHECKPOINTS,
            model=gpt,
            optimizer=optimizer,
            scheduler=scheduler,
            schedule=settings.schedule,
            device=self.device,
            job=job,
            versions=dict(self.invocation.versions),
            keep=training.keep_checkpoints,
        )
        log = MetricsLog(path / METRICS_FILE)

        def write_metrics(step: Step) -> None:
            if self.is_first_rank:
                log.append(step.metrics())

        def write_manifest(step: int) -> None:
            if not self.is_first_rank or fp8_run.manifest is None:
                return
            document = fp8_run.manifest.to_dict()
            if settings.schedule.spans:
                (path / MANIFESTS).mkdir(exist_ok=True)
                atomic_write_json(path / MANIFESTS / f"step_{step:08d}.json", document)
            atomic_write_json(path / MANIFEST_FILE, document)

        return Trainer(
            settings=training,
            model=wrapped,
            forward=Forward(wrapped, dataset, plan, model.seq_length, self.device),
            optimizer=optimizer,
            scheduler=scheduler,
            fp8_run=fp8_run,
            checkpointer=checkpointer,
            log=write_metrics,
            proven=write_manifest,
            before_save=lambda: self.recorder.flush() if self.recorder is not None else None,
            alerts=self.alert_actions,
        )

    def _start_record(self, path: Path, start: Position, *, resumed: bool) -> None:
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
                resumed_at=start.step if resumed else None,
            )
            MetricsLog(path / METRICS_FILE).truncate_after(start.step)

        agree(write)

    def _show_banner(self, trainer: Trainer, dataset: Dataset, path: Path, start: Position) -> None:
        settings, sizes = self.settings, self.sizes
        parameters = count_parameters(trainer.checkpointer.model)  # collective
        versions = self.invocation.versions
        model, plan = settings.model, trainer.forward.plan
        rows = {
            "recipe": str(settings.schedule),
            **(
                {"modules": ", ".join(f"{entry.pattern} in {entry.recipe}" for entry in settings.modules)}
                if settings.modules
                else {}
            ),
            "device": self.invocation.device_label,
            "model": f"{model.display_name}: {model.num_layers} layers, hidden {model.hidden_size}, "
            f"{model.num_attention_heads} heads, {parameters / 1e6:,.1f} M parameters",
            "data": f"{dataset.name}: {dataset.description}",
            "batch": f"{plan.global_batch_size} x {model.seq_length} tokens a step in {plan.micro_batches} "
            f"micro-batch(es) a rank",
            "parallelism": f"{dist.get_world_size()} process(es): data {plan.data_ranks}, tensor {sizes.tp}"
            f"{' with sequence' if sizes.sequence else ''}, pipeline {sizes.pp}, context {sizes.cp}",
            "versions": ", ".join(f"{name} {version or '-'}" for name, version in versions.items()),
            "run directory": str(path),
        }
        if start.step:
            rows["resumed"] = f"after step {start.step} of {settings.training.steps}"
        display.banner(self.console, rows)
        for note in self.invocation.notes:
            self.console.print(note, style="yellow", markup=False)

    # -- after the last step -----------------------------------------------------------------------------

    def _finish(self, path: Path, outcome: Outcome, held_out: float | None) -> None:
        if self.run_dir is None:
            return
        rows = read_metrics(path / METRICS_FILE)
        losses = (rows[0]["loss"], rows[-1]["loss"]) if rows else None
        if outcome.finished:
            self.run_dir.finish(
                {
                    "steps": outcome.position.step,
                    "first_loss": losses[0] if losses else None,
                    "last_loss": losses[1] if losses else None,
                    "held_out_loss": held_out,
                }
            )
        else:
            reason = _stopped_by(outcome)
            self.run_dir.interrupt(f"stopped after step {outcome.position.step} {reason}")
            self.console.print(f"Stopped after step {outcome.position.step} {reason}.")
        _show_report(path, self.console)
        resumable = not outcome.finished and (self.settings.training.save_every > 0 or bool(outcome.rule))
        for sink, values in (self.recorder.lost if self.recorder is not None else {}).items():
            self.console.print(f"[bold]Telemetry is incomplete:[/bold] {sink} lost {values} values.")
        display.farewell(
            self.console,
            path,
            held_out=held_out,
            tensorboard=(path / "tensorboard").is_dir(),
            resumable=resumable,
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


def _stopped_by(outcome: Outcome) -> str:
    if outcome.signal:
        return f"by signal {outcome.signal}"
    return f"by the alert {outcome.rule}" if outcome.rule else "as asked (training.stop_at_step)"


def _data_rank() -> int:
    from megatron.core import parallel_state

    return int(parallel_state.get_data_parallel_rank())


def _show_report(path: Path, console: Console) -> None:
    from nemo_fp8_recipes.report import text

    text.render(path, console)


def _record_failure(run_dir: RunDirectory, error: BaseException) -> None:
    """Say in `run.json` that the run failed; if even that cannot be written, the error says so too."""
    try:
        run_dir.fail(error)
    except Exception as second:  # noqa: BLE001  # the first error is the one to report
        error.add_note(f"{run_dir.path / 'run.json'} could not be updated: {second}")
