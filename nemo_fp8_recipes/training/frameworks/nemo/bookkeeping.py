"""What the reference loop does around its steps, as a Lightning callback: metrics, checkpoints, stopping."""

# ruff: noqa: ARG002 -- the signatures are Lightning's

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from nemo_fp8_recipes.errors import CheckpointError
from nemo_fp8_recipes.training.alert_actions import AlertActions
from nemo_fp8_recipes.training.checkpoint import directory as directories
from nemo_fp8_recipes.training.data import BatchPlan, Dataset
from nemo_fp8_recipes.training.display import ProgressLine
from nemo_fp8_recipes.training.distributed import agree, seed_everything
from nemo_fp8_recipes.training.files import writing
from nemo_fp8_recipes.training.forward import Forward
from nemo_fp8_recipes.training.interruption import Interruption, received
from nemo_fp8_recipes.training.job_record import End, JobRecord
from nemo_fp8_recipes.training.run_directory import CHECKPOINTS
from nemo_fp8_recipes.training.settings import Settings
from nemo_fp8_recipes.training.step import Step

__all__ = ["Bookkeeping"]


class Bookkeeping(Callback):
    """Seeds, logs every step, saves when a checkpoint is due, stops when asked to.

    Attributes:
        step: completed optimizer steps.
        signal: the signal that stopped the job; 0: none did.
        held_out: loss of the held-out batches after the last step; None where it was not reached.
    """

    def __init__(
        self,
        settings: Settings,
        dataset: Dataset,
        record: JobRecord,
        *,
        job: Mapping[str, Any],
        versions: Mapping[str, str | None],
        interruption: Interruption,
        alerts: AlertActions,
        line: ProgressLine,
    ) -> None:
        self.step = record.start
        self.signal = 0
        self.held_out: float | None = None
        self._settings = settings
        self._dataset = dataset
        self._record = record
        self._checkpoints = record.path / CHECKPOINTS
        self._job = dict(job)
        self._versions = dict(versions)
        self._interruption = interruption
        self._alerts = alerts
        self._line = line
        self._started = 0.0
        self._saved = record.start

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Processes and groups are there, the model is not: the same random states as in the reference
        loop."""
        seed_everything(self._settings.training.seed)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._started = time.perf_counter()
        self._rate = float(trainer.strategy.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        training = self._settings.training
        found = trainer.callback_metrics
        self.step = int(trainer.global_step)
        step = Step(
            step=self.step,
            loss=self._everywhere(found["reduced_train_loss"]),
            learning_rate=self._rate,
            grad_norm=float(found.get("grad_norm", 0.0)),
            step_time_ms=(time.perf_counter() - self._started) * 1e3,
            tokens=self.step * training.global_batch_size * self._settings.model.seq_length,
        )
        self._line.update(step.step, step.loss, step.step_time_ms)
        if step.is_logged(training):
            self._record.log(step)
        if not step.finite:
            raise step.diverged(self._settings.recipe.name)
        every = training.save_every
        due = every and (self.step % every == 0 or self.step == training.steps)
        if self._alerts.take_checkpoint() or due:
            self._save(trainer)
        self.signal = self._signal_of_some_rank()
        if self.signal or self._alerts.stop is not None or self.step == training.stop_at_step:
            if every and self.step > self._saved:
                self._save(trainer)
            trainer.should_stop = True

    def end(self, *, lost: Mapping[str, int]) -> End:
        """How the training ended; `lost`: what telemetry's sinks could not write."""
        rule = self._alerts.stop.rule if self._alerts.stop is not None else None
        return End(self.step, held_out=self.held_out, signal=self.signal, rule=rule, lost=lost)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The held-out loss, as the reference loop has it: same batches, same forward pass."""
        from megatron.core import parallel_state

        training = self._settings.training
        if self.step < training.steps or not training.eval_batches:
            return
        ranks = parallel_state.get_data_parallel_world_size()
        plan = BatchPlan(
            training.global_batch_size,
            training.micro_batch_size,
            parallel_state.get_data_parallel_rank(),
            ranks,
        )
        wrapped = trainer.strategy.megatron_parallel[0].module
        device = next(wrapped.parameters()).device
        forward = Forward(wrapped, self._dataset, plan, self._settings.model.seq_length, device)
        self.held_out = forward.held_out_loss(training.eval_batches)

    # -- steps -------------------------------------------------------------------------------------------

    @staticmethod
    def _everywhere(loss: torch.Tensor) -> float:
        """The loss on every rank: under pipeline parallelism only some know it."""
        from megatron.core import parallel_state

        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            loss = loss.detach().clone()
            dist.broadcast(
                loss,
                parallel_state.get_pipeline_model_parallel_last_rank(),
                group=parallel_state.get_pipeline_model_parallel_group(),
            )
        return float(loss)

    def _signal_of_some_rank(self) -> int:
        """The signal that some rank has received by now, on every rank; 0: none has."""
        flags = torch.tensor(self._interruption.flags())
        if dist.get_world_size() > 1:
            flags = flags.cuda() if dist.get_backend() == "nccl" else flags
            dist.all_reduce(flags)
        return received(flags.tolist())

    # -- checkpoints -------------------------------------------------------------------------------------

    def _save(self, trainer: Any) -> None:
        """NeMo's checkpoint in `checkpoints/step_XXXXXX`; it counts only once its marker is there."""
        path = directories.checkpoint_path(self._checkpoints, self.step)

        def prepare() -> None:
            with writing(path):
                if path.exists():
                    (path / directories.MARKER).unlink(missing_ok=True)
                    shutil.rmtree(path)
                self._checkpoints.mkdir(parents=True, exist_ok=True)

        def complete() -> None:
            names = [str(file.relative_to(path)) for file in sorted(path.rglob("*")) if file.is_file()]
            marker = directories.CompleteMarker(
                self.step, self._job, self._versions, directories.digest_files(path, names)
            )
            directories.write_marker(path, marker)
            directories.prune(
                self._checkpoints, keep=self._settings.training.keep_checkpoints, newest=self.step
            )

        agree(prepare)
        try:
            trainer.save_checkpoint(path)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"Cannot save {path}: {error}.", key="training.save_every", hint="Is the disk full?"
            ) from error
        agree(complete)
        self._saved = self.step
