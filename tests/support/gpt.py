"""A small GPT of Megatron-Core with the real Transformer Engine layer spec, its DDP, its optimizer, its
schedule.

Import it only where the emulated device is in place. Everything is Megatron's own: nothing here comes from
`nemo_fp8_recipes.training`, so it is an independent check of what the emulated device has to carry.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.activations import squared_relu
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

__all__ = ["RECIPES", "Trainer"]

VOCABULARY = 64
SEQUENCE = 32
MICRO_BATCH = 4

RECIPES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "delayed": {
        "fp8": "hybrid",
        "fp8_recipe": "delayed",
        "fp8_amax_history_len": 4,
        "fp8_amax_compute_algo": "max",
    },
    "tensorwise": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    "mxfp8": {"fp8": "e4m3", "fp8_recipe": "mxfp8"},
    "blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
}
"""Recipe -> the TransformerConfig fields that ask Megatron for it."""


@dataclass
class Trainer:
    """Trains sequences in which every token decides the next one; a few dozen steps learn that."""

    recipe: str = "bf16"
    tp: int = 1
    pp: int = 1
    ep: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    fp8_param: bool = False
    layers: int = 2
    hidden: int = 128
    micro_batches: int = 1
    learning_rate: float = 3e-3
    seed: int = 1
    model_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not dist.is_initialized():
            if "RANK" in os.environ:
                dist.init_process_group("nccl")
            else:
                dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(self.tp, self.pp, expert_model_parallel_size=self.ep)
        FP8GlobalStateManager.reset()  # it keeps amax buffers, and their groups, of modules that are gone
        torch.manual_seed(self.seed)
        model_parallel_cuda_manual_seed(self.seed, force_reset_rng=True)
        self.config = self._config()
        self.model = self._model()
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=self.learning_rate,
                weight_decay=0.01,
                bf16=True,
                clip_grad=1.0,
                use_distributed_optimizer=self.distributed_optimizer,
                fp8_recipe=self.config.fp8_recipe if self.config.fp8 else None,
                reuse_grad_buf_for_mxfp8_param_ag=self._weights_through_grad_buffer,
            ),
            [self.model],
        )
        rank = parallel_state.get_data_parallel_rank()
        self._generator = torch.Generator().manual_seed(1000 + self.seed + 10 * rank)

    def _config(self) -> TransformerConfig:
        fp8 = dict(RECIPES[self.recipe])
        if fp8:
            fp8 |= {"first_last_layers_bf16": False, "fp8_param": self.fp8_param}
        return TransformerConfig(
            num_layers=self.layers,
            hidden_size=self.hidden,
            ffn_hidden_size=4 * self.hidden,
            num_attention_heads=4,
            num_query_groups=2,
            params_dtype=torch.bfloat16,
            pipeline_dtype=torch.bfloat16,
            bf16=True,
            add_bias_linear=False,
            activation_func=squared_relu,
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            expert_model_parallel_size=self.ep,
            sequence_parallel=self.sequence_parallel,
            gradient_accumulation_fusion=False,
            masked_softmax_fusion=False,
            finalize_model_grads_func=finalize_model_grads,
            **(fp8 | {"hidden_dropout": 0.0, "attention_dropout": 0.0} | self.model_options),
        )

    def _model(self) -> DistributedDataParallel:
        from megatron.core.fp8_utils import get_fp8_context

        with get_fp8_context(self.config, is_init=True) if self.fp8_param else torch.enable_grad():
            gpt = GPTModel(
                config=self.config,
                transformer_layer_spec=get_gpt_layer_with_transformer_engine_spec(
                    num_experts=self.config.num_moe_experts
                ),
                vocab_size=VOCABULARY,
                max_sequence_length=SEQUENCE,
                position_embedding_type="rope",
                share_embeddings_and_output_weights=False,
                pre_process=parallel_state.is_pipeline_first_stage(),
                post_process=parallel_state.is_pipeline_last_stage(),
            )
        from megatron.core.transformer.module import Float16Module

        return DistributedDataParallel(
            self.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=self.distributed_optimizer,
                fp8_param_gather=self.fp8_param,
                reuse_grad_buf_for_mxfp8_param_ag=self._weights_through_grad_buffer,
            ),
            Float16Module(self.config, gpt.cuda(torch.cuda.current_device())),
        )

    @property
    def _weights_through_grad_buffer(self) -> bool:
        """How Megatron's distributed optimizer updates MXFP8 weights: in no other way."""
        return self.recipe == "mxfp8" and self.fp8_param and self.distributed_optimizer

    @property
    def gpt(self) -> GPTModel:
        return self.model.module.module

    def step(self) -> float:
        """One optimizer step; the loss before it, averaged over micro-batches (NaN off the last stage)."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=iter(lambda: self._batch(), None),
            model=[self.model],
            num_microbatches=self.micro_batches,
            seq_length=SEQUENCE,
            micro_batch_size=MICRO_BATCH,
            forward_only=False,
        )
        updated, self.grad_norm, _ = self.optimizer.step()
        assert updated
        values = [entry["loss"].item() for entry in losses]
        return sum(values) / len(values) if values else float("nan")

    def train(self, steps: int) -> list[float]:
        return [self.step() for _ in range(steps)]

    def _batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.empty(MICRO_BATCH, SEQUENCE + 1, dtype=torch.long)
        tokens[:, 0] = torch.randint(VOCABULARY, (MICRO_BATCH,), generator=self._generator)
        for position in range(SEQUENCE):
            tokens[:, position + 1] = (5 * tokens[:, position] + 3) % VOCABULARY
        return tokens[:, :-1].contiguous().cuda(), tokens[:, 1:].contiguous().cuda()

    def _forward(self, batches: Any, model: Any) -> tuple[torch.Tensor, Any]:
        tokens, labels = next(batches)
        positions = torch.arange(SEQUENCE, device="cuda").expand(MICRO_BATCH, SEQUENCE)
        losses = model(tokens, positions, None, labels=labels)

        def reduce(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            loss = output.float().mean()
            return loss, {"loss": loss.detach().clone()}

        return losses, reduce

    def delayed_state(self) -> dict[str, list[float]]:
        """Module name and direction -> scales, for delayed scaling."""
        return {
            f"{name}.{direction}": module.fp8_meta[f"scaling_{direction}"].scale.tolist()
            for name, module in self.gpt.named_modules()
            for direction in ("fwd", "bwd")
            if f"scaling_{direction}" in getattr(module, "fp8_meta", {})
        }
