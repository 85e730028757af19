"""A small job for Bridge's `pretrain()`, written with Bridge's own classes, and what was seen while it ran.

Import it only where the emulated device is in place.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.training import config as bridge_config
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.config import (
    CheckpointConfig,
    ConfigContainer,
    DistributedDataParallelConfig,
    LoggerConfig,
    MockGPTDatasetConfig,
    OptimizerConfig,
    RNGConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainingConfig,
)
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.core.transformer.enums import AttnBackend
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

from nemo_fp8_recipes.emulation import trace
from nemo_fp8_recipes.emulation.trace import GemmRecord

LAYERS, STEPS, SEQUENCE, MICRO_BATCH = 4, 6, 32, 4
LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
MODULES = tuple(f"decoder.layers.{layer}.{name}" for layer in range(LAYERS) for name in LINEARS)


def job(
    mixed_precision: Any, *, steps: int = STEPS, checkpoints: Path | None = None, tp: int = 1, **model: Any
) -> ConfigContainer:
    """A container for a GPT of 4 layers; with `checkpoints` it saves at its end and resumes from there."""
    for name, value in {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
        "RANK": "0",
        "WORLD_SIZE": "1",
    }.items():
        os.environ.setdefault(name, value)
    validation = {"eval_interval": 1000, "eval_iters": 0}
    has_validation = hasattr(bridge_config, "ValidationConfig")
    parts: dict[str, Any] = (
        {"validation": bridge_config.ValidationConfig(**validation)} if has_validation else {}
    )
    directory = None if checkpoints is None else str(checkpoints)
    provider = {
        "num_layers": LAYERS,
        "hidden_size": 128,
        "ffn_hidden_size": 256,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "seq_length": SEQUENCE,
        "vocab_size": 256,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": False,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "attention_backend": AttnBackend.unfused,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "cross_entropy_loss_fusion": False,
        "gradient_accumulation_fusion": False,
        "tensor_model_parallel_size": tp,
        **model,
    }
    return ConfigContainer(
        model=GPTModelProvider(**provider),
        train=TrainingConfig(
            train_iters=steps,
            global_batch_size=MICRO_BATCH,
            micro_batch_size=MICRO_BATCH,
            **({} if has_validation else validation),
        ),
        optimizer=OptimizerConfig(optimizer="adam", lr=1e-3, min_lr=1e-4, use_distributed_optimizer=False),
        scheduler=SchedulerConfig(
            lr_decay_style="constant",
            lr_decay_iters=100,
            lr_warmup_iters=0,
            start_weight_decay=0.1,
            end_weight_decay=0.1,
            weight_decay_incr_style="constant",
            override_opt_param_scheduler=True,
        ),
        ddp=DistributedDataParallelConfig(use_distributed_optimizer=False),
        dataset=MockGPTDatasetConfig(
            random_seed=1234,
            seq_length=SEQUENCE,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            dataloader_type="single",
            num_workers=0,
        ),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=255),
        logger=LoggerConfig(log_interval=1),
        checkpoint=CheckpointConfig(
            save=directory,
            load=directory,
            save_interval=steps if directory else None,
            ckpt_format="torch_dist",
        ),
        rng=RNGConfig(seed=1234),
        mixed_precision=mixed_precision,
        **parts,
    )


@dataclass
class Seen(Callback):
    """What an onlooker sees of a run: GEMMs, losses, and the recipe in force inside Megatron's FP8 context.

    Attributes:
        gemms: the GEMMs of each step.
        losses: the loss of each step.
        recipes: Transformer Engine's recipe object during the forward pass of each module, by its class and
            representation; None outside of any FP8 context.
        first_state: amax history and scale of each module before the first step, where it has them.
    """

    gemms: list[list[GemmRecord]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    recipes: dict[str, Any] = field(default_factory=dict)
    first_state: dict[str, Any] = field(default_factory=dict)
    last_state: dict[str, Any] = field(default_factory=dict)

    def on_train_start(self, context: Any) -> None:
        from nemo_fp8_recipes.injection.module_names import named_modules

        self._modules = {
            item.path: item.module for item in named_modules(context.model) if item.path in MODULES
        }
        for path, module in self._modules.items():
            module.register_forward_pre_hook(self._look(path))
        self.first_state = self._state()

    def _look(self, path: str) -> Any:
        def look(*_: Any) -> None:
            enabled = FP8GlobalStateManager.is_fp8_enabled()
            self.recipes[path] = FP8GlobalStateManager.get_fp8_recipe() if enabled else None

        return look

    def _state(self) -> dict[str, Any]:
        return {
            path: (meta.amax_history.clone(), meta.scale.clone())
            for path, module in self._modules.items()
            if hasattr(meta := module.fp8_meta.get("scaling_fwd"), "amax_history")
        }

    def on_train_step_start(self, context: Any) -> None:
        self._trace = trace()
        self._observed = self._trace.__enter__()

    def on_train_step_end(self, context: Any) -> None:
        self._trace.__exit__(None, None, None)
        self.gemms.append(list(self._observed.gemms))
        loss = context.loss_dict["lm loss"].flatten().tolist()
        self.losses.append(loss[0] / loss[1] if len(loss) == 2 else loss[0])
        self.last_state = self._state()

    def on_train_end(self, context: Any) -> None:
        self._modules = {}


def run(config: ConfigContainer, *callbacks: Any) -> Seen:
    """Bridge's `pretrain()` on `config`."""
    seen = Seen()
    ours = not dist.is_initialized()
    try:
        pretrain(config, forward_step, callbacks=[*callbacks, seen])
    finally:
        if ours and dist.is_initialized():
            dist.destroy_process_group()
        FP8GlobalStateManager.reset()
    return seen
