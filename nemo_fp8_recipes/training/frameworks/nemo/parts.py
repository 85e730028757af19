"""The job's model, data, optimizer and schedule as NeMo's classes.

Each is made from the settings that the reference loop's is made from.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import nemo.lightning as nl
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from nemo.collections import llm
from nemo.lightning.pytorch.optim.base import LRSchedulerModule
from nemo.lightning.pytorch.plugins import MegatronDataSampler
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.training.data import Dataset
from nemo_fp8_recipes.training.model import gpt_fields, transformer_fields
from nemo_fp8_recipes.training.optimizer import build_scheduler
from nemo_fp8_recipes.training.schema import OptimizerConfig
from nemo_fp8_recipes.training.settings import Settings

__all__ = ["DataModule", "build_model", "build_optimizer", "build_strategy", "check_supported"]

_NOT_IN_GPT_CONFIG = ("rope_scaling", "rope_scaling_factor")


def check_supported(settings: Settings) -> None:
    """Raise `ConfigError` for what the job may say and NeMo's trainer would not do."""
    if settings.model.rope_scaling_factor is not None:
        raise ConfigError(
            f"{settings.model.display_name} scales its rotary embeddings, which NeMo's GPTConfig cannot say.",
            key="model.rope_scaling_factor",
            value=settings.model.rope_scaling_factor,
            allowed=["null"],
            hint="Train it with framework=megatron_core.",
        )


def build_model(settings: Settings, *, emulated: bool) -> llm.GPTModel:
    """NeMo's GPTModel; the trainer builds Megatron's inside it. The recipe's fields come with the plugin."""
    model = settings.model
    fields = transformer_fields(
        model,
        settings.parallel,
        settings.megatron,
        emulated=emulated,
        deterministic=settings.training.deterministic,
    )
    gpt = {key: value for key, value in gpt_fields(model).items() if key not in _NOT_IN_GPT_CONFIG}
    # NeMo's own layer spec is Transformer Engine's where that is installed.
    config = llm.GPTConfig(
        **fields,
        **gpt,
        seq_length=model.seq_length,
        vocab_size=model.vocab_size,
        cross_entropy_loss_fusion=False,
    )
    return llm.GPTModel(config, tokenizer=SimpleNamespace(vocab_size=model.vocab_size))


def build_strategy(settings: Settings) -> nl.MegatronStrategy:
    """Parallelism, gradient buckets and checkpoints."""
    sizes, optimizer = settings.parallel, settings.optimizer
    return nl.MegatronStrategy(
        tensor_model_parallel_size=sizes.tp,
        pipeline_model_parallel_size=sizes.pp,
        context_parallel_size=sizes.cp,
        sequence_parallel=sizes.sequence,
        pipeline_dtype=torch.bfloat16,
        ckpt_async_save=False,
        ddp=DistributedDataParallelConfig(
            grad_reduce_in_fp32=optimizer.grad_reduce_in_fp32,
            overlap_grad_reduce=optimizer.overlap_grad_reduce,
            overlap_param_gather=optimizer.overlap_param_gather,
            use_distributed_optimizer=optimizer.distributed_optimizer,
        ),
    )


class _Sequences(TorchDataset[dict[str, torch.Tensor]]):
    """The job's numbered training sequences, as many as it will see: Megatron's sampler deals them out over
    ranks and micro-batches just as `BatchPlan` does."""

    def __init__(self, dataset: Dataset, length: int) -> None:
        self._dataset = dataset
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        row = self._dataset.train(int(number))
        tokens, labels = row[:-1].contiguous(), row[1:].contiguous()
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": torch.ones_like(tokens, dtype=torch.float32),
            "position_ids": torch.arange(tokens.numel()),
        }


class DataModule(pl.LightningDataModule):
    """The job's dataset for NeMo's trainer."""

    def __init__(self, settings: Settings, dataset: Dataset) -> None:
        super().__init__()
        training = settings.training
        self._dataset = _Sequences(dataset, training.steps * training.global_batch_size)
        self._global_batch_size = training.global_batch_size
        self.data_sampler = MegatronDataSampler(
            seq_len=settings.model.seq_length,
            micro_batch_size=training.micro_batch_size,
            global_batch_size=training.global_batch_size,
            output_log=False,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self._dataset, num_workers=0, pin_memory=True)

    def resume_after(self, step: int) -> None:
        """Let the data go on after `step` completed optimizer steps."""
        self.data_sampler.init_global_step = step
        self.data_sampler.init_consumed_samples = step * self._global_batch_size
        self.data_sampler.prev_consumed_samples = step * self._global_batch_size


class _Schedule(LRSchedulerModule):
    """The learning rate that the reference loop has, computed by Megatron's own scheduler."""

    def __init__(self, settings: OptimizerConfig, total_steps: int) -> None:
        super().__init__()
        self._settings = settings
        self._total_steps = total_steps

    def scheduler(self, model: Any, optimizer: Any) -> dict[str, Any]:  # noqa: ARG002 -- NeMo's signature
        holder: Any = SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.0}])
        curve = build_scheduler(self._settings, holder, total_steps=self._total_steps)
        peak = self._settings.lr

        def factor(step: int) -> float:
            curve.num_steps = step
            return float(curve.get_lr({"max_lr": peak, "min_lr": self._settings.min_lr})) / peak

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "frequency": 1},
        }


def build_optimizer(settings: Settings) -> nl.MegatronOptimizerModule:
    """Megatron's Adam as NeMo sets it up, with the reference loop's schedule."""
    optimizer = settings.optimizer
    return nl.MegatronOptimizerModule(
        config=MegatronOptimizerConfig(
            optimizer="adam",
            lr=optimizer.lr,
            min_lr=optimizer.min_lr,
            weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.adam_beta1,
            adam_beta2=optimizer.adam_beta2,
            adam_eps=optimizer.adam_eps,
            clip_grad=optimizer.clip_grad,
            bf16=True,
            params_dtype=torch.bfloat16,
            use_distributed_optimizer=optimizer.distributed_optimizer,
            overlap_param_gather=optimizer.overlap_param_gather,
        ),
        lr_scheduler=_Schedule(optimizer, settings.training.steps),
    )
