"""Megatron's optimizer and learning-rate schedule from the configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nemo_fp8_recipes.training.lr_schedule import schedule_steps
from nemo_fp8_recipes.training.schema import OptimizerConfig

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

__all__ = ["build_optimizer", "build_scheduler"]


def build_optimizer(settings: OptimizerConfig, model: DistributedDataParallel) -> MegatronOptimizer:
    """Adam over FP32 master weights, distributed over the data-parallel ranks when asked for."""
    from megatron.core import optimizer as megatron_optimizer
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_distributed_optimizer=settings.distributed_optimizer,
        overlap_param_gather=settings.overlap_param_gather,
        # The distributed optimizer keeps its own copy of the recipe's name and branches on it.
        fp8_recipe=model.config.fp8_recipe if model.config.fp8 else None,
    )
    # Biases and norms take no weight decay: said by overrides since 0.16, Megatron's own default before.
    overrides = getattr(megatron_optimizer, "get_standard_config_overrides", None)
    said = {"config_overrides": overrides(config)} if overrides is not None else {}
    return megatron_optimizer.get_megatron_optimizer(config, [model], **said)


def build_scheduler(
    settings: OptimizerConfig, optimizer: MegatronOptimizer, *, total_steps: int
) -> OptimizerParamScheduler:
    """The learning rate as a function of completed optimizer steps. As in Megatron, the first step of a
    warm-up has learning rate zero."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    decay_steps, warmup_steps = schedule_steps(settings, total_steps)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=decay_steps,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=decay_steps,
        wd_incr_style="constant",
        # A resumed job may extend training.steps: the decay follows the configuration, not the checkpoint.
        override_opt_param_scheduler=True,
        use_checkpoint_opt_param_scheduler=False,
    )
