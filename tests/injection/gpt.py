"""A tiny GPT of Megatron-Core's own classes with Transformer Engine's layer spec, and a training step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from nemo_fp8_recipes.recipes import Recipe

__all__ = ["HIDDEN", "LINEARS", "SEQUENCE", "build", "config_of", "process_group", "train_step"]

HIDDEN, HEADS, SEQUENCE, BATCH, VOCABULARY = 128, 4, 32, 2, 64

LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


@contextmanager
def process_group() -> Iterator[None]:
    """torch.distributed and Megatron's groups, one process."""
    from megatron.core import parallel_state

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
    finally:
        dist.destroy_process_group()


def config_of(recipe: Recipe | None, *, layers: int = 2, **overrides: Any) -> Any:
    """Megatron's TransformerConfig with the recipe's fields; None leaves Megatron's defaults."""
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.transformer_config import TransformerConfig

    fields: dict[str, Any] = {
        "num_layers": layers,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": 2 * HIDDEN,
        "num_attention_heads": HEADS,
        "bf16": True,
        "params_dtype": torch.bfloat16,
        "pipeline_dtype": torch.bfloat16,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "add_bias_linear": False,
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "attention_backend": AttnBackend.unfused,
        **(recipe.megatron() if recipe is not None else {}),
        **overrides,
    }
    return TransformerConfig(**fields)


def build(config: Any, *, spec: Any = None) -> nn.Module:
    """The GPTModel of a config, with Transformer Engine's layer spec unless another is given."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    torch.manual_seed(0)
    get_cuda_rng_tracker().reset()
    model_parallel_cuda_manual_seed(1)
    return GPTModel(
        config=config,
        transformer_layer_spec=spec or get_gpt_layer_with_transformer_engine_spec(),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


def train_step(model: nn.Module, *, seed: int = 0) -> float:
    """Forward, backward and a plain SGD step; the loss."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE), generator=generator)
    positions = torch.arange(SEQUENCE)[None].expand(BATCH, SEQUENCE)
    model.set_is_first_microbatch()
    loss = model(tokens, positions, None, labels=tokens).float().mean()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None and type(parameter) is nn.Parameter:
                parameter -= 0.01 * parameter.grad
            parameter.grad = None
    return loss.item()
