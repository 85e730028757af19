"""The job's settings as Bridge's `ConfigContainer`."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.training import config as bridge

from nemo_fp8_recipes.callbacks.bridge import mixed_precision
from nemo_fp8_recipes.training.frameworks.bridge.data import RunData
from nemo_fp8_recipes.training.invocation import Invocation
from nemo_fp8_recipes.training.lr_schedule import schedule_steps
from nemo_fp8_recipes.training.model import gpt_fields, transformer_fields
from nemo_fp8_recipes.training.settings import Settings

__all__ = ["container", "may_save"]


def container(
    settings: Settings, invocation: Invocation, *, checkpoints: Path, resume_from: Path | None
) -> bridge.ConfigContainer:
    """The same model, data, batches, optimizer and schedule as the reference job's, with Bridge's classes.

    Args:
        settings: the job.
        invocation: where it runs.
        checkpoints: where checkpoints are saved, when the job saves any.
        resume_from: the directory of checkpoints to go on from; None starts anew.
    """
    model, training, optimizer = settings.model, settings.training, settings.optimizer
    decay, warmup = schedule_steps(optimizer, training.steps)
    # Evaluated once, after the last step.
    evaluation = {"eval_interval": training.steps + 1, "eval_iters": training.eval_batches}
    validates_apart = hasattr(bridge, "ValidationConfig")  # since Bridge 0.4
    parts: dict[str, Any] = {"validation": bridge.ValidationConfig(**evaluation)} if validates_apart else {}
    return bridge.ConfigContainer(
        model=GPTModelProvider(
            **transformer_fields(
                model,
                settings.parallel,
                settings.megatron,
                emulated=invocation.emulated,
                deterministic=training.deterministic,
            ),
            **gpt_fields(model),
            seq_length=model.seq_length,
            vocab_size=model.vocab_size,
            cross_entropy_loss_fusion=not invocation.emulated,
        ),
        train=bridge.TrainingConfig(
            train_iters=training.steps,
            global_batch_size=training.global_batch_size,
            micro_batch_size=training.micro_batch_size,
            **({} if validates_apart else evaluation),
        ),
        optimizer=bridge.OptimizerConfig(
            optimizer="adam",
            lr=optimizer.lr,
            min_lr=optimizer.min_lr,
            weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.adam_beta1,
            adam_beta2=optimizer.adam_beta2,
            adam_eps=optimizer.adam_eps,
            clip_grad=optimizer.clip_grad,
            use_distributed_optimizer=optimizer.distributed_optimizer,
        ),
        scheduler=bridge.SchedulerConfig(
            lr_decay_style=optimizer.lr_decay_style,
            lr_decay_iters=decay,
            lr_warmup_iters=warmup,
            start_weight_decay=optimizer.weight_decay,
            end_weight_decay=optimizer.weight_decay,
            weight_decay_incr_style="constant",
            override_opt_param_scheduler=True,
        ),
        ddp=bridge.DistributedDataParallelConfig(
            use_distributed_optimizer=optimizer.distributed_optimizer,
            overlap_grad_reduce=optimizer.overlap_grad_reduce,
            overlap_param_gather=optimizer.overlap_param_gather,
            grad_reduce_in_fp32=optimizer.grad_reduce_in_fp32,
        ),
        dataset=RunData(
            data=dataclasses.asdict(settings.data),
            run_dir=str(checkpoints.parent),
            seq_length=model.seq_length,
            vocab_size=model.vocab_size,
            dataloader_type="single",
            num_workers=0,
        ),
        # The data are token numbers already; Bridge wants a tokenizer all the same.
        tokenizer=bridge.TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=model.vocab_size - 1),
        logger=bridge.LoggerConfig(log_interval=training.log_every, logging_level=logging.WARNING),
        checkpoint=bridge.CheckpointConfig(
            # An interval of 0 saves nothing, not even at the end, until an alert asks for it (`StepRecord`).
            save=str(checkpoints) if may_save(settings) else None,
            save_interval=training.save_every if may_save(settings) else None,
            load=str(resume_from) if resume_from is not None else None,
            most_recent_k=training.keep_checkpoints,
            ckpt_format="torch_dist",
            async_save=False,
        ),
        rng=bridge.RNGConfig(seed=training.seed),
        # A loss that is NaN is reported once, by the job, with the step's telemetry.
        rerun_state_machine=bridge.RerunStateMachineConfig(check_for_nan_in_loss=False),
        mixed_precision=_precision(settings),
        **parts,
    )


def may_save(settings: Settings) -> bool:
    """Whether the job may save a checkpoint: regularly, or because an alert asks for it."""
    return settings.training.save_every > 0 or settings.alerts.acts


def _precision(settings: Settings) -> Any:
    precision = mixed_precision(settings.recipe)
    precision.grad_reduce_in_fp32 = settings.optimizer.grad_reduce_in_fp32
    return precision
