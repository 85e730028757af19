"""How many steps the learning rate warms up and decays. Imports no torch."""

from __future__ import annotations

from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.training.schema import OptimizerConfig

__all__ = ["schedule_steps"]

DEFAULT_WARMUP = 10  # steps, where the configuration leaves it open and the job is long enough


def schedule_steps(settings: OptimizerConfig, total_steps: int) -> tuple[int, int]:
    """Steps of decay and of warm-up. Raises `ConfigError` where the warm-up leaves nothing to decay."""
    decay_steps = settings.lr_decay_steps if settings.lr_decay_steps is not None else total_steps
    warmup_steps = settings.lr_warmup_steps
    if warmup_steps is None:
        warmup_steps = min(DEFAULT_WARMUP, decay_steps // 10)
    if warmup_steps >= decay_steps:
        raise ConfigError(
            f"optimizer.lr_warmup_steps={warmup_steps} leaves nothing of {decay_steps} steps to decay.",
            key="optimizer.lr_warmup_steps",
            value=warmup_steps,
            allowed=[f"< {decay_steps}"],
            hint="Set fewer warm-up steps or more training.steps.",
        )
    return decay_steps, warmup_steps
