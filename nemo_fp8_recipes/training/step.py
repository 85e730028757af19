"""One completed optimizer step: what is logged of it, and when a job cannot go on. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from nemo_fp8_recipes.training.errors import DivergedError
from nemo_fp8_recipes.training.schema import TrainingConfig

__all__ = ["Step"]


@dataclass(frozen=True)
class Step:
    """One completed optimizer step. Losses are means per token over the global batch.

    Attributes:
        step: its number; the first one is 1.
        step_time_ms: wall time, milliseconds.
        tokens: training tokens consumed so far, over all ranks.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    step_time_ms: float
    tokens: int

    def metrics(self) -> dict[str, float | int]:
        return asdict(self)

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    def is_logged(self, training: TrainingConfig) -> bool:
        """Whether metrics.jsonl gets it: every `log_every`-th step, the first, the last, and one that
        diverged."""
        return self.step % training.log_every == 0 or self.step in (1, training.steps) or not self.finite

    def diverged(self, recipe: str) -> DivergedError:
        """The error that ends a job trained with `recipe` after this step."""
        return DivergedError(
            f"Step {self.step} diverged: loss {self.loss}, gradient norm {self.grad_norm}.",
            key="fp8_recipe",
            value=recipe,
            hint="The telemetry up to here shows where; try another recipe or a lower optimizer.lr.",
        )
