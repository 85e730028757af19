"""The configuration as the YAML that Bridge merges over its own config: its `config_filepath`.

Plain data: imports neither Bridge nor torch.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.recipes import Recipe
from nemo_fp8_recipes.targets import bridge
from nemo_fp8_recipes.training.lr_schedule import schedule_steps
from nemo_fp8_recipes.training.settings import Settings

__all__ = ["GROUPS", "document", "precision"]

GROUPS = ("model", "parallel", "training", "optimizer")
"""Groups that Bridge's config has sections for, beside `fp8_recipe`."""

_ACTIVATIONS = {"squared_relu": "squared_relu", "gelu": "gelu", "swiglu": "silu"}


def document(settings: Settings, groups: Collection[str] = ()) -> dict[str, Any]:
    """The YAML document.

    Args:
        settings: the composed configuration.
        groups: which of `GROUPS` to write besides the recipe: the ones that the user named, so that the
            others stay what Bridge's own recipe says.

    Raises:
        ConfigError: a model that Bridge builds by another class than the one its config holds.
    """
    sections: dict[str, Any] = {"mixed_precision": precision(settings.recipe)}
    if "model" in groups:
        sections["model"] = _model(settings)
        sections["dataset"] = {"seq_length": settings.model.seq_length}
    if "parallel" in groups:
        sizes = settings.parallel
        sections.setdefault("model", {}).update(
            tensor_model_parallel_size=sizes.tp,
            pipeline_model_parallel_size=sizes.pp,
            context_parallel_size=sizes.cp,
            sequence_parallel=sizes.sequence,
        )
    if "training" in groups:
        training = settings.training
        sections["train"] = {
            "train_iters": training.steps,
            "global_batch_size": training.global_batch_size,
            "micro_batch_size": training.micro_batch_size,
        }
        sections["rng"] = {"seed": training.seed}
    if "optimizer" in groups:
        sections |= _optimizer(settings)
    return sections


def precision(recipe: Recipe) -> dict[str, Any]:
    """The section `mixed_precision`: our class, the whole recipe, and every field of Bridge's that is its."""
    fields = {
        name: value
        for name, value in bridge.fields(recipe).items()
        if value is not None or not name.endswith("_recipe")
    }
    return {"_target_": bridge.TARGET, "recipe": recipe.to_dict(), **fields}


def _model(settings: Settings) -> dict[str, Any]:
    model = settings.model
    if model.hybrid is not None:
        raise ConfigError(
            f"model={model.name} has Mamba layers, whose pattern is part of Bridge's own model recipes.",
            key="model",
            value=model.name,
            hint="Take Bridge's recipe of that model, and from here fp8_recipe and parallel alone.",
        )
    section = {
        name: getattr(model, name)
        for name in (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
            "vocab_size",
            "seq_length",
            "normalization",
            "layernorm_zero_centered_gamma",
            "layernorm_epsilon",
            "add_bias_linear",
            "init_method_std",
            "attention_dropout",
            "hidden_dropout",
            "rotary_percent",
            "rotary_base",
        )
    }
    if section["kv_channels"] is None:
        section["kv_channels"] = model.hidden_size // model.num_attention_heads
    return {
        **section,
        "activation_func": _ACTIVATIONS[model.activation],
        "gated_linear_unit": model.activation == "swiglu",
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": model.tie_embeddings,
        "rope_scaling": model.rope_scaling_factor is not None,
        "rope_scaling_factor": model.rope_scaling_factor or 1.0,
    }


def _optimizer(settings: Settings) -> dict[str, Any]:
    optimizer = settings.optimizer
    decay, warmup = schedule_steps(optimizer, settings.training.steps)
    distributed = optimizer.distributed_optimizer
    return {
        "optimizer": {
            "optimizer": "adam",
            **{
                name: getattr(optimizer, name)
                for name in (
                    "lr",
                    "min_lr",
                    "weight_decay",
                    "adam_beta1",
                    "adam_beta2",
                    "adam_eps",
                    "clip_grad",
                )
            },
            "use_distributed_optimizer": distributed,
        },
        "scheduler": {
            "lr_decay_style": optimizer.lr_decay_style,
            "lr_decay_iters": decay,
            "lr_warmup_iters": warmup,
            "start_weight_decay": optimizer.weight_decay,
            "end_weight_decay": optimizer.weight_decay,
            "weight_decay_incr_style": "constant",
        },
        "ddp": {
            "use_distributed_optimizer": distributed,
            "overlap_grad_reduce": optimizer.overlap_grad_reduce,
            "overlap_param_gather": optimizer.overlap_param_gather,
        },
    }
