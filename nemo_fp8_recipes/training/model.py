"""The model: Megatron-Core's GPTModel with the Transformer Engine layer spec, wrapped as Megatron trains
it."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch

from nemo_fp8_recipes.preflight import MegatronSettings
from nemo_fp8_recipes.recipes import Recipe
from nemo_fp8_recipes.training.layout import ParallelSizes
from nemo_fp8_recipes.training.schema import ModelConfig, OptimizerConfig

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = ["build_gpt", "count_parameters", "gpt_fields", "transformer_config", "transformer_fields", "wrap"]


def transformer_config(
    model: ModelConfig,
    recipe: Recipe,
    sizes: ParallelSizes,
    megatron: MegatronSettings,
    *,
    emulated: bool,
    deterministic: bool,
) -> TransformerConfig:
    """Megatron's TransformerConfig for this model, recipe and parallelism."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    fields = transformer_fields(model, sizes, megatron, emulated=emulated, deterministic=deterministic)
    return TransformerConfig(**fields, **recipe.megatron())


def transformer_fields(
    model: ModelConfig,
    sizes: ParallelSizes,
    megatron: MegatronSettings,
    *,
    emulated: bool,
    deterministic: bool,
) -> dict[str, Any]:
    """Fields of TransformerConfig, and of what others derive from it, without the recipe's.

    Emulated, the fusions are off that run as CUDA kernels, and attention is Transformer Engine's unfused one.
    """
    from megatron.core.activations import squared_relu
    from megatron.core.transformer.enums import AttnBackend

    activation: dict[str, Any] = {
        "squared_relu": {"activation_func": squared_relu},
        "gelu": {"activation_func": torch.nn.functional.gelu},
        "swiglu": {"activation_func": torch.nn.functional.silu, "gated_linear_unit": True},
    }[model.activation]
    native = not emulated
    return dict(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        normalization=model.normalization,
        layernorm_zero_centered_gamma=model.layernorm_zero_centered_gamma,
        layernorm_epsilon=model.layernorm_epsilon,
        add_bias_linear=model.add_bias_linear,
        init_method_std=model.init_method_std,
        attention_dropout=model.attention_dropout,
        hidden_dropout=model.hidden_dropout,
        **activation,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        tensor_model_parallel_size=sizes.tp,
        pipeline_model_parallel_size=sizes.pp,
        context_parallel_size=sizes.cp,
        sequence_parallel=sizes.sequence,
        attention_backend=AttnBackend.auto if native else AttnBackend.unfused,
        deterministic_mode=deterministic and native,
        # Megatron's own output layer needs APEX's extension to accumulate weight gradients inside the GEMM.
        gradient_accumulation_fusion=native and _available("fused_weight_gradient_mlp_cuda"),
        bias_activation_fusion=False,
        bias_dropout_fusion=native,
        masked_softmax_fusion=native,
        apply_rope_fusion=native,
        **megatron.transformer_fields(),
    )


def gpt_fields(model: ModelConfig) -> dict[str, Any]:
    """What GPTModel is told beside its TransformerConfig, by the names that Megatron uses everywhere."""
    return dict(
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="rope",
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        rope_scaling=model.rope_scaling_factor is not None,
        rope_scaling_factor=model.rope_scaling_factor or 1.0,
    )


def _available(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def build_gpt(model: ModelConfig, config: TransformerConfig) -> GPTModel:
    """This rank's part of the GPT model. Call it while the recipe is injected: FP8 weights are made here."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_with_transformer_engine_spec(),
        vocab_size=model.padded_vocabulary(config.tensor_model_parallel_size),
        max_sequence_length=model.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        **gpt_fields(model),
    )


def wrap(
    gpt: GPTModel, optimizer: OptimizerConfig, *, fp8_param: bool, device: torch.device
) -> DistributedDataParallel:
    """`gpt` on its device, behind Megatron's BF16 and data-parallel wrappers, rank 0's weights everywhere."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=optimizer.grad_reduce_in_fp32,
        overlap_grad_reduce=optimizer.overlap_grad_reduce,
        overlap_param_gather=optimizer.overlap_param_gather,
        use_distributed_optimizer=optimizer.distributed_optimizer,
        fp8_param_gather=fp8_param,
    )
    wrapped = DistributedDataParallel(gpt.config, ddp_config, Float16Module(gpt.config, gpt.to(device)))
    wrapped.broadcast_params()
    return wrapped


def count_parameters(gpt: GPTModel) -> int:
    """Parameters of the whole model: this rank's, with tensor-parallel shards counted in full, over all
    stages."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    tp = parallel_state.get_tensor_model_parallel_world_size()
    count = sum(
        parameter.numel() * (tp if getattr(parameter, "tensor_model_parallel", False) else 1)
        for parameter in gpt.parameters()
    )
    total = torch.tensor([count], dtype=torch.int64, device=next(gpt.parameters()).device)
    dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
    return int(total)
