"""What the job's record needs of each step: metrics, progress, and the wish to stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.bridge.training.callbacks import Callback, CallbackContext

from nemo_fp8_recipes.callbacks.bridge.callback import train_metrics
from nemo_fp8_recipes.training.alert_actions import AlertActions
from nemo_fp8_recipes.training.display import ProgressLine
from nemo_fp8_recipes.training.interruption import Interruption, received
from nemo_fp8_recipes.training.settings import Settings
from nemo_fp8_recipes.training.step import Step

__all__ = ["StepRecord"]


@dataclass
class StepRecord(Callback):
    """Writes metrics, moves the progress bar, ends the job where it should stop or has diverged.

    Attributes:
        step: completed optimizer steps.
        signal: the signal that stopped the job, 0 for none.
        held_out_loss: of the evaluation after the last step; on the last pipeline stage.
    """

    settings: Settings
    interruption: Interruption
    alerts: AlertActions
    line: ProgressLine
    log: Callable[[Step], None]
    device: torch.device
    step: int = 0
    signal: int = 0
    held_out_loss: float | None = None
    _extra_save: bool = field(default=False, repr=False)
    _started: float = field(default=0.0, repr=False)
    _learning_rate: float = field(default=0.0, repr=False)

    def on_train_start(self, context: CallbackContext) -> None:
        self.step = int(context.state.train_state.step)

    def on_train_step_start(self, context: CallbackContext) -> None:
        if self._extra_save:
            context.state.cfg.checkpoint.save_interval = self.settings.training.save_every
            self._extra_save = False
        self._started = time.perf_counter()
        # The schedule moves on before the step's end is told.
        self._learning_rate = float(context.optimizer.param_groups[0]["lr"])

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Raises `DivergedError`, on every rank, for a loss or gradient that is NaN or infinite."""
        training = self.settings.training
        here = train_metrics(context)
        loss, norm = self._everywhere(here.get("loss"), here.get("grad_norm", 0.0))
        self.step = int(context.state.train_state.step) + 1
        step = Step(
            step=self.step,
            loss=loss,
            learning_rate=self._learning_rate,
            grad_norm=norm,
            step_time_ms=(time.perf_counter() - self._started) * 1e3,
            tokens=self.step * training.global_batch_size * self.settings.model.seq_length,
        )
        self.line.update(step.step, step.loss, step.step_time_ms)
        diverged = context.skipped_iter or not step.finite
        if diverged or step.is_logged(training):
            self.log(step)
        if diverged:
            raise step.diverged(self.settings.recipe.name)
        if self.alerts.take_checkpoint():
            self._save_after_this_step(context)
        if self.signal or self.alerts.stop is not None or self.step == training.stop_at_step:
            _end_after_this_step(context)

    def _save_after_this_step(self, context: CallbackContext) -> None:
        """Bridge saves after the steps that its interval divides, and offers no other way to ask."""
        context.state.cfg.checkpoint.save_interval = self.step
        self._extra_save = True

    def on_eval_end(self, context: CallbackContext) -> None:
        for name, value in (context.total_loss_dict or {}).items():
            if name == "lm loss":
                numbers = torch.as_tensor(value).double().flatten().tolist()
                self.held_out_loss = numbers[0] / numbers[1] if len(numbers) == 2 else numbers[0]

    def _everywhere(self, loss: float | None, norm: float) -> tuple[float, float]:
        """Loss and gradient norm on every rank, and a signal that any rank has received: one collective.

        Only the last pipeline stage has a loss, and all of its ranks have the same.
        """
        row = torch.tensor(
            [loss or 0.0, float(loss is not None), norm, 1.0, *self.interruption.flags()],
            dtype=torch.float64,
            device=self.device,
        )
        if dist.get_world_size() > 1:
            dist.all_reduce(row)
        total, having, norms, ranks, *signals = row.tolist()
        self.signal = received(signals)
        return (total / having if having else float("nan")), norms / ranks


def _end_after_this_step(context: CallbackContext) -> None:
    """Bridge trains while its step is below `train_iters`; then it saves, if it saves at all."""
    context.state.cfg.train.train_iters = int(context.state.train_state.step) + 1
    context.state.train_state.do_valid = False
