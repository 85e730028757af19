"""The training loop: one optimizer step after the other, until the last one or a wish to stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_fp8_recipes.callbacks.megatron_core import Fp8Run
from nemo_fp8_recipes.training.alert_actions import AlertActions
from nemo_fp8_recipes.training.checkpoint.checkpointer import Checkpointer, Position
from nemo_fp8_recipes.training.display import ProgressLine
from nemo_fp8_recipes.training.forward import Forward, reduce_loss
from nemo_fp8_recipes.training.interruption import Interruption, received
from nemo_fp8_recipes.training.schema import TrainingConfig
from nemo_fp8_recipes.training.step import Step

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

__all__ = ["Outcome", "Trainer"]


@dataclass(frozen=True)
class Outcome:
    """How the loop ended: where, and what stopped it before the last step: a signal (0: none did), or the
    alert rule of this name.
    """

    position: Position
    finished: bool
    signal: int = 0
    rule: str | None = None


@dataclass
class Trainer:
    """Drives `Forward`, the optimizer and its schedule; reports each step to the recipe's `Fp8Run` and the
    log."""

    settings: TrainingConfig
    model: DistributedDataParallel
    forward: Forward
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    fp8_run: Fp8Run
    checkpointer: Checkpointer
    log: Callable[[Step], None]
    """Called on every rank after each `log_every`-th step, the first and the last."""
    proven: Callable[[int], None]
    """Called on every rank with the step after which the manifest was read back: a recipe's first one."""
    before_save: Callable[[], None]
    """Called on every rank before a checkpoint, so that what was logged up to it is on disk too."""
    alerts: AlertActions
    """What the alerts of the step before ask for."""

    def run(self, start: Position, interruption: Interruption, line: ProgressLine) -> Outcome:
        """Train from `start` to the last step. Collective.

        Raises:
            DivergedError: the loss or the gradient is NaN or infinite.
            InjectionError: after the first step the model does not do what the recipe says.
        """
        last = self.settings.steps
        stop_at = min(last, self.settings.stop_at_step or last)
        saved = start.step
        position, stopped = start, 0
        while position.step < stop_at and not stopped and self.alerts.stop is None:
            step, stopped = self._step(position, interruption)
            position = Position(step.step, position.consumed + self.forward.plan.global_batch_size)
            line.update(step.step, step.loss, step.step_time_ms)
            if step.is_logged(self.settings):
                self.log(step)
            if self.fp8_run.proven_at == position.step:
                self.proven(position.step)
            if self.alerts.take_checkpoint() or self._save_due(position.step):
                self._save(position)
                saved = position.step
        if self.settings.save_every and position.step > saved:
            self._save(position)
        rule = self.alerts.stop.rule if self.alerts.stop is not None else None
        return Outcome(position, finished=position.step >= last, signal=stopped, rule=rule)

    def _save(self, position: Position) -> None:
        self.before_save()
        self.checkpointer.save(position, self.fp8_run.recipe)

    def _save_due(self, step: int) -> bool:
        every = self.settings.save_every
        return every > 0 and (step % every == 0 or step == self.settings.steps)

    def _step(self, position: Position, interruption: Interruption) -> tuple[Step, int]:
        """One optimizer step and the signal, if any, that some rank has received by its end."""
        started = time.perf_counter()
        number = position.step + 1
        self.fp8_run.begin_step(number)
        # Here, not when it is asked for: alerts also come with the flush before a checkpoint, which must find
        # the state of the old recipe.
        if (recipe := self.alerts.take_recipe()) is not None:
            self.fp8_run.switch(recipe)
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = self.forward.train(position.consumed)
        succeeded, grad_norm, _ = self.optimizer.step()
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        self.scheduler.step(increment=1)
        loss, *signals = reduce_loss(reports, self.forward.device, *interruption.flags())
        norm = float(grad_norm) if grad_norm is not None else 0.0
        step = Step(
            step=number,
            loss=loss,
            learning_rate=learning_rate,
            grad_norm=norm,
            step_time_ms=(time.perf_counter() - started) * 1e3,
            tokens=(position.consumed + self.forward.plan.global_batch_size) * self.forward.seq_length,
        )
        self.fp8_run.end_step(number, {"loss": loss, "learning_rate": learning_rate, "grad_norm": norm})
        if not (succeeded and step.finite):
            self.log(step)
            raise step.diverged(self.fp8_run.recipe.name)
        return step, received(signals)
