"""The job through Bridge's `pretrain()`, leaving the run directory that the reference job leaves.

What Bridge prints goes to `bridge.log` in it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain

from nemo_fp8_recipes.callbacks.bridge import Fp8Callback, active
from nemo_fp8_recipes.errors import CheckpointError, Fp8Error
from nemo_fp8_recipes.report import text
from nemo_fp8_recipes.training import display
from nemo_fp8_recipes.training.checkpoint.directory import require_same_job
from nemo_fp8_recipes.training.data import Dataset, Wanted, build_dataset
from nemo_fp8_recipes.training.distributed import agree, rendezvous, same_everywhere, together
from nemo_fp8_recipes.training.files import atomic_write_json
from nemo_fp8_recipes.training.frameworks.bridge.container import container
from nemo_fp8_recipes.training.frameworks.bridge.record import RunRecord
from nemo_fp8_recipes.training.interruption import watch_signals
from nemo_fp8_recipes.training.invocation import Invocation
from nemo_fp8_recipes.training.metrics import MetricsLog, read_metrics
from nemo_fp8_recipes.training.resume import open_run
from nemo_fp8_recipes.training.run_directory import CHECKPOINTS, METRICS_FILE, RunDirectory
from nemo_fp8_recipes.training.settings import Settings
from nemo_fp8_recipes.training.trainer import Step

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["run_session"]

TRACKER = "latest_checkpointed_iteration.txt"  # Megatron's: the step of the newest complete checkpoint
JOB_FILE = "job.json"
LOG_FILE = "bridge.log"


def run_session(settings: Settings, invocation: Invocation) -> int:
    """Train; returns the exit status: 0, or 128 + the signal that stopped the job."""
    timeout = settings.training.distributed_timeout_minutes
    with rendezvous(on_gpu=not invocation.emulated, timeout_minutes=timeout) as device, ExitStack() as stack:
        return _Session(settings, invocation, device).run(stack)


def newest_step(checkpoints: Path) -> int | None:
    """The step of the newest complete checkpoint that Bridge saved there; None where there is none."""
    try:
        return int((checkpoints / TRACKER).read_text().strip())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointError(f"{checkpoints / TRACKER} does not hold a step.") from error


class _Session:
    def __init__(self, settings: Settings, invocation: Invocation, device: torch.device) -> None:
        self.settings = settings
        self.invocation = invocation
        self.device = device
        self.first_rank = dist.get_rank() == 0
        self.console: Console = display.make_console(quiet=not self.first_rank)
        self.console.file = sys.stdout  # and not what `_bridges_output` puts in its place
        self.run_dir: RunDirectory | None = None  # on rank 0

    def run(self, stack: ExitStack) -> int:
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
        path, step = self._open(stack, dataset)
        try:
            return self._train(path, step, dataset)
        except BaseException as error:
            if self.run_dir is not None:
                self._record_failure(self.run_dir, error)
            raise

    def _open(self, stack: ExitStack, dataset: Dataset) -> tuple[Path, int | None]:
        """The run directory, and the step to go on from; None for a new run."""
        settings = self.settings

        def newest(checkpoints: Path) -> Path | None:
            return checkpoints if newest_step(checkpoints) is not None else None

        def opened() -> tuple[str, int | None]:
            opening = open_run(settings.run_dir, settings.training.resume, settings.recipe.name, newest)
            self.run_dir = opening.run
            stack.callback(opening.run.close)
            checkpoints = opening.run.checkpoints
            job = settings.job_identity(
                data_fingerprint=dataset.fingerprint, world_size=dist.get_world_size()
            )
            step = newest_step(checkpoints) if opening.checkpoint is not None else None
            if step is not None:
                require_same_job(checkpoints, json.loads((checkpoints / JOB_FILE).read_text()), job)
            elif settings.training.save_every:
                checkpoints.mkdir(exist_ok=True)
                atomic_write_json(checkpoints / JOB_FILE, job)
            return str(opening.run.path), step if step is not None else (0 if opening.goes_on else None)

        path, step = agree(opened)
        return Path(path), step

    def _train(self, path: Path, resumed_at: int | None, dataset: Dataset) -> int:
        settings, invocation = self.settings, self.invocation
        start = resumed_at or 0
        self._start_record(path, resumed_at)
        display.banner(self.console, self._facts(path, dataset, start))
        for note in invocation.notes:
            self.console.print(note, style="yellow", markup=False)
        checkpoints = path / CHECKPOINTS
        config = container(
            settings, invocation, checkpoints=checkpoints, resume_from=checkpoints if start else None
        )
        log = MetricsLog(path / METRICS_FILE)

        def write_metrics(step: Step) -> None:
            if self.first_rank:
                log.append(step.metrics())

        telemetry = settings.telemetry
        callback = Fp8Callback(
            path,
            recipe=settings.recipe,
            log_every=telemetry.log_every,
            sinks=telemetry.sinks,
            history=telemetry.history,
            flush_every=telemetry.flush_every,
            device=invocation.device_label,
            enabled=telemetry.enabled,
        )
        with (
            watch_signals() as interruption,
            display.progress(self.console, total=settings.training.steps, done=start) as line,
            _bridges_output(path if self.first_rank else None),
        ):
            record = RunRecord(settings, interruption, line, write_metrics, self.device)
            try:
                pretrain(config, forward_step, callbacks=[callback, record])
            finally:
                active.end()
        self._finish(path, record, callback)
        return 128 + record.signal if record.signal else 0

    # -- the run's record --------------------------------------------------------------------------------

    def _start_record(self, path: Path, resumed_at: int | None) -> None:
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
                resumed_at=resumed_at,
            )
            MetricsLog(path / METRICS_FILE).truncate_after(resumed_at or 0)

        agree(write)

    def _facts(self, path: Path, dataset: Dataset, start: int) -> dict[str, str]:
        settings, sizes, training = self.settings, self.settings.parallel, self.settings.training
        model = settings.model
        processes = dist.get_world_size()
        facts = {
            "recipe": settings.recipe.name,
            "device": self.invocation.device_label,
            "framework": "Megatron-Bridge: pretrain()",
            "model": f"{model.display_name}: {model.num_layers} layers, hidden {model.hidden_size}, "
            f"{model.num_attention_heads} heads",
            "data": f"{dataset.name}: {dataset.description}",
            "batch": f"{training.global_batch_size} x {model.seq_length} tokens a step",
            "parallelism": f"{processes} process(es): data {sizes.data_parallel(processes)}, "
            f"tensor {sizes.tp}{' with sequence' if sizes.sequence else ''}, pipeline {sizes.pp}, "
            f"context {sizes.cp}",
            "versions": ", ".join(
                f"{name} {version or '-'}" for name, version in self.invocation.versions.items()
            ),
            "run directory": str(path),
        }
        if start:
            facts["resumed"] = f"after step {start} of {training.steps}"
        return facts

    def _finish(self, path: Path, record: RunRecord, callback: Fp8Callback) -> None:
        held_out = _first_known(record.held_out_loss)
        if self.run_dir is None:
            return
        training = self.settings.training
        finished = record.step >= training.steps
        rows = read_metrics(path / METRICS_FILE)
        if finished:
            self.run_dir.finish(
                {
                    "steps": record.step,
                    "first_loss": rows[0]["loss"] if rows else None,
                    "last_loss": rows[-1]["loss"] if rows else None,
                    "held_out_loss": held_out,
                }
            )
        else:
            reason = f"by signal {record.signal}" if record.signal else "as asked (training.stop_at_step)"
            self.run_dir.interrupt(f"stopped after step {record.step} {reason}")
            self.console.print(f"Stopped after step {record.step} {reason}.")
        text.render(path, self.console)
        for sink, values in (callback.recorder.lost if callback.recorder is not None else {}).items():
            self.console.print(f"[bold]Telemetry is incomplete:[/bold] {sink} lost {values} values.")
        display.farewell(
            self.console,
            path,
            held_out=held_out,
            tensorboard=(path / "tensorboard").is_dir(),
            resumable=not finished and training.save_every > 0,
        )

    @staticmethod
    def _record_failure(run_dir: RunDirectory, error: BaseException) -> None:
        """Say in `run.json` that the run failed; if even that cannot be written, the error says so too."""
        try:
            run_dir.fail(error)
        except Exception as second:  # noqa: BLE001  # the first error is the one to report
            error.add_note(f"{run_dir.path / 'run.json'} could not be updated: {second}")


@contextlib.contextmanager
def _bridges_output(run_dir: Path | None) -> Iterator[None]:
    """What Bridge prints goes to its own log in the run directory; on the other ranks nowhere.

    An error that the user can put right is said once, by the command line: Bridge would log its traceback.
    """
    logger = logging.getLogger("megatron.bridge.training.pretrain")
    logger.addFilter(_not_ours)
    with ExitStack() as stack:
        stack.callback(logger.removeFilter, _not_ours)
        if run_dir is None:
            stack.enter_context(contextlib.redirect_stdout(None))
        else:
            file = stack.enter_context((run_dir / LOG_FILE).open("a", encoding="utf-8", buffering=1))
            stack.enter_context(contextlib.redirect_stdout(file))
        yield


def _not_ours(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, Fp8Error)


def _first_known(value: float | None) -> float | None:
    """The value of the first rank that has one, on every rank."""
    values: list[float | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return next((found for found in values if found is not None), None)
