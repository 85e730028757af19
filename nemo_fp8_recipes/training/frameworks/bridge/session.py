"""The job through Bridge's `pretrain()`, leaving the run directory that the reference job leaves.

What Bridge prints goes to `bridge.log` in it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain

from nemo_fp8_recipes.callbacks.bridge import Fp8Callback, active
from nemo_fp8_recipes.errors import CheckpointError, Fp8Error
from nemo_fp8_recipes.training import display
from nemo_fp8_recipes.training.alert_actions import AlertActions, load_callback
from nemo_fp8_recipes.training.checkpoint.directory import require_same_job
from nemo_fp8_recipes.training.data import Dataset
from nemo_fp8_recipes.training.distributed import agree, rendezvous
from nemo_fp8_recipes.training.files import atomic_write_json
from nemo_fp8_recipes.training.frameworks.bridge.container import container, may_save
from nemo_fp8_recipes.training.frameworks.bridge.record import StepRecord
from nemo_fp8_recipes.training.interruption import watch_signals
from nemo_fp8_recipes.training.invocation import Invocation
from nemo_fp8_recipes.training.job_data import load_dataset
from nemo_fp8_recipes.training.job_record import End, JobRecord
from nemo_fp8_recipes.training.run_directory import CHECKPOINTS
from nemo_fp8_recipes.training.settings import Settings

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
        self.alert_actions = AlertActions(load_callback(settings.alerts.callback))

    def run(self, stack: ExitStack) -> int:
        dataset = load_dataset(self.settings, self.invocation)
        job = self.settings.job_identity(
            data_fingerprint=dataset.fingerprint, world_size=dist.get_world_size()
        )
        record = JobRecord.open(
            stack,
            self.settings,
            self.invocation,
            self.console,
            newest=lambda checkpoints: checkpoints if newest_step(checkpoints) is not None else None,
            look=lambda checkpoints: _step_of_this_job(checkpoints, job),
        )
        with record.failing():
            if record.checkpoint is None and may_save(self.settings):
                agree(lambda: _write_job(record.path / CHECKPOINTS, job))
            return self._train(record, dataset)

    def _train(self, record: JobRecord, dataset: Dataset) -> int:
        settings, invocation = self.settings, self.invocation
        record.begin()
        record.show_banner(dataset, processes=dist.get_world_size(), framework="Megatron-Bridge: pretrain()")
        config = container(
            settings,
            invocation,
            checkpoints=record.path / CHECKPOINTS,
            resume_from=record.path / CHECKPOINTS if record.start else None,
        )
        telemetry = settings.telemetry
        callback = Fp8Callback(
            record.path,
            recipe=settings.recipe,
            log_every=telemetry.log_every,
            stats_every=telemetry.stats_every,
            whatif=telemetry.whatif,
            alerts=settings.alerts,
            on_alert=self.alert_actions if settings.alerts.acts else None,
            sinks=telemetry.sinks,
            history=telemetry.history,
            flush_every=telemetry.flush_every,
            device=invocation.device_label,
            enabled=telemetry.enabled,
        )
        with (
            watch_signals() as interruption,
            display.progress(self.console, total=settings.training.steps, done=record.start) as line,
            _bridges_output(record.path if self.first_rank else None),
        ):
            steps = StepRecord(settings, interruption, self.alert_actions, line, record.log, self.device)
            try:
                pretrain(config, forward_step, callbacks=[callback, steps])
            finally:
                active.end()
        end = End(
            steps.step,
            held_out=_first_known(steps.held_out_loss),
            signal=steps.signal,
            rule=self.alert_actions.stop.rule if self.alert_actions.stop is not None else None,
            lost=callback.recorder.lost if callback.recorder is not None else None,
        )
        record.end(end)
        return end.status


def _step_of_this_job(checkpoints: Path, job: Mapping[str, Any]) -> int:
    """The newest step there. Raises `CheckpointError` where it is of another job."""
    step = newest_step(checkpoints)
    assert step is not None
    require_same_job(checkpoints, json.loads((checkpoints / JOB_FILE).read_text()), job)
    return step


def _write_job(checkpoints: Path, job: Mapping[str, Any]) -> None:
    checkpoints.mkdir(exist_ok=True)
    atomic_write_json(checkpoints / JOB_FILE, job)


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
