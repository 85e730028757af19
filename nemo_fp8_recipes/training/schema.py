"""The typed shape of the groups `model`, `data`, `optimizer` and `training`. Imports no torch.

`conf/<group>/*.yaml` gives the values, these dataclasses the types and the limits: a value that cannot work
is a `ConfigError` that names its key before anything is built.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from nemo_fp8_recipes.errors import ConfigError, nearest
from nemo_fp8_recipes.training.indexed_schema import MegatronIndexedConfig

__all__ = [
    "GROUPS",
    "DataConfig",
    "FrameworkConfig",
    "HybridConfig",
    "MockConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PublishedConfig",
    "StdlibTextConfig",
    "TrainingConfig",
]

ACTIVATIONS = ("squared_relu", "gelu", "swiglu")
NORMALIZATIONS = ("LayerNorm", "RMSNorm")
SCALES = ("full", "tiny")
LAYER_KINDS = {"M": "Mamba", "*": "attention", "-": "MLP", "E": "experts"}
MOST_LAYERS = 10_000
"""Far more than any model has: each is a row of the manifest and a module to build."""
LR_DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root")


def _one_of(key: str, value: object, allowed: Iterable[str]) -> None:
    allowed = tuple(allowed)
    if value not in allowed:
        close = nearest(str(value), allowed)
        raise ConfigError(
            f"{key}={value} is not available.",
            key=key,
            value=value,
            allowed=allowed,
            hint=f"Did you mean '{close}'?" if close else None,
        )


def _at_least(key: str, value: float | None, minimum: float) -> None:
    """`minimum` <= value, and finite."""
    if value is not None and not minimum <= value < math.inf:
        finite = " and finite" if isinstance(value, float) else ""
        raise ConfigError(
            f"{key}={value} is out of range.", key=key, value=value, allowed=[f">= {minimum:g}{finite}"]
        )


def _within(key: str, value: float, low: float, high: float) -> None:
    """`low` <= value < `high`."""
    if not low <= value < high:
        raise ConfigError(
            f"{key}={value} is out of range.", key=key, value=value, allowed=[f">= {low:g} and < {high:g}"]
        )


@dataclass
class FrameworkConfig:
    """Whose trainer runs the job."""

    name: Literal["megatron_core", "nemo", "bridge"] = "megatron_core"


@dataclass
class PublishedConfig:
    """What the model's own training configuration uses: a choice of fp8_recipe, the parallelism, and where
    that stands."""

    fp8_recipe: str
    tp: int
    pp: int
    cp: int
    ep: int
    sequence: bool
    source: str

    def __post_init__(self) -> None:
        for field in ("tp", "pp", "cp", "ep"):
            _at_least(f"model.published.{field}", getattr(self, field), 1)


@dataclass
class HybridConfig:
    """Layers of several kinds in Megatron's pattern: M Mamba-2, * attention, - MLP, E experts.

    `expert_ffn_hidden_size` and `shared_expert_ffn_hidden_size` are the inner widths of one expert and of the
    expert that sees every token, `moe_latent_size` the width that tokens are projected to before the routed
    experts; `num_experts` and what depends on it is null without E layers.
    """

    layer_pattern: str
    mamba_num_heads: int
    mamba_head_dim: int
    mamba_state_dim: int
    mamba_num_groups: int
    num_experts: int | None
    experts_per_token: int | None
    expert_ffn_hidden_size: int | None
    shared_expert_ffn_hidden_size: int | None
    moe_latent_size: int | None = None

    def __post_init__(self) -> None:
        for field in ("mamba_num_heads", "mamba_head_dim", "mamba_state_dim", "mamba_num_groups"):
            _at_least(f"model.hybrid.{field}", getattr(self, field), 1)
        unknown = sorted(set(self.layer_pattern) - set(LAYER_KINDS))
        if unknown or not self.layer_pattern:
            raise ConfigError(
                f"model.hybrid.layer_pattern={self.layer_pattern} has layers of no known kind.",
                key="model.hybrid.layer_pattern",
                value=self.layer_pattern,
                allowed=[f"{sign} ({kind})" for sign, kind in LAYER_KINDS.items()],
            )
        experts = ("num_experts", "experts_per_token", "expert_ffn_hidden_size")
        for field in (*experts, "shared_expert_ffn_hidden_size", "moe_latent_size"):
            _at_least(f"model.hybrid.{field}", getattr(self, field), 1)
            if field in experts and "E" in self.layer_pattern and getattr(self, field) is None:
                raise ConfigError(
                    f"model.hybrid.{field} is missing, and layer_pattern has layers of experts (E).",
                    key=f"model.hybrid.{field}",
                    allowed=["an integer"],
                )


@dataclass
class ModelConfig:
    """A GPT model in Megatron-Core's own terms: dense, or with `hybrid` Mamba and expert layers among others.

    `scale=tiny` is put into effect when the configuration is composed (config/scale.py): the sizes found here
    are already those of the tiny model.
    """

    name: str
    display_name: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    vocab_size: int
    seq_length: int
    kv_channels: int | None = None
    activation: str = "squared_relu"
    normalization: str = "LayerNorm"
    layernorm_zero_centered_gamma: bool = True
    layernorm_epsilon: float = 1e-5
    rotary_percent: float = 0.5
    rotary_base: int = 10000
    add_bias_linear: bool = False
    tie_embeddings: bool = False
    init_method_std: float = 0.02
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    rope_scaling_factor: float | None = None
    make_vocab_size_divisible_by: int = 128
    """Megatron pads the vocabulary to a multiple of this times the tensor-parallel ranks."""
    scale: str = "full"
    published: PublishedConfig | None = None
    hybrid: HybridConfig | None = None

    def padded_vocabulary(self, tp: int) -> int:
        """Rows of the embedding and of the output layer over `tp` tensor-parallel ranks."""
        multiple = self.make_vocab_size_divisible_by * tp
        return -(-self.vocab_size // multiple) * multiple

    def __post_init__(self) -> None:
        _one_of("model.scale", self.scale, SCALES)
        _at_least("model.rope_scaling_factor", self.rope_scaling_factor, 1)
        if self.hybrid is not None and len(self.hybrid.layer_pattern) != self.num_layers:
            raise ConfigError(
                f"model.hybrid.layer_pattern names {len(self.hybrid.layer_pattern)} layers, and "
                f"model.num_layers={self.num_layers}.",
                key="model.hybrid.layer_pattern",
                value=self.hybrid.layer_pattern,
            )
        for field in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"):
            _at_least(f"model.{field}", getattr(self, field), 1)
        if self.num_layers > MOST_LAYERS:
            raise ConfigError(
                f"model.num_layers={self.num_layers} is out of range.",
                key="model.num_layers",
                value=self.num_layers,
                allowed=[f"<= {MOST_LAYERS}"],
            )
        for field in ("num_query_groups", "vocab_size", "kv_channels", "rotary_base"):
            _at_least(f"model.{field}", getattr(self, field), 1)
        _at_least("model.make_vocab_size_divisible_by", self.make_vocab_size_divisible_by, 1)
        _at_least("model.seq_length", self.seq_length, 2)
        for field in ("layernorm_epsilon", "init_method_std"):
            _at_least(f"model.{field}", getattr(self, field), 0)
        _one_of("model.activation", self.activation, ACTIVATIONS)
        _one_of("model.normalization", self.normalization, NORMALIZATIONS)
        _within("model.attention_dropout", self.attention_dropout, 0.0, 1.0)
        _within("model.hidden_dropout", self.hidden_dropout, 0.0, 1.0)
        if not 0.0 < self.rotary_percent <= 1.0:
            raise ConfigError(
                f"model.rotary_percent={self.rotary_percent} is out of range.",
                key="model.rotary_percent",
                value=self.rotary_percent,
                allowed=["> 0 and <= 1"],
            )
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"model.hidden_size={self.hidden_size} does not divide by "
                f"model.num_attention_heads={self.num_attention_heads}.",
                key="model.hidden_size",
                value=self.hidden_size,
                allowed=[f"a multiple of {self.num_attention_heads}"],
                hint="Or set model.kv_channels, the size of one head.",
            )
        if self.num_attention_heads % self.num_query_groups:
            raise ConfigError(
                f"model.num_attention_heads={self.num_attention_heads} does not divide by "
                f"model.num_query_groups={self.num_query_groups}.",
                key="model.num_query_groups",
                value=self.num_query_groups,
                allowed=[
                    n for n in range(1, self.num_attention_heads + 1) if self.num_attention_heads % n == 0
                ],
            )


@dataclass
class StdlibTextConfig:
    """Byte-level text of the running Python's own standard library."""

    name: str = "stdlib_text"
    path: str | None = None
    pattern: str = "*.py"
    max_bytes: int = 8_000_000
    held_out_every: int = 20
    seed: int = 1234

    def __post_init__(self) -> None:
        _at_least("data.max_bytes", self.max_bytes, 1)
        _at_least("data.held_out_every", self.held_out_every, 2)
        _at_least("data.seed", self.seed, 0)


@dataclass
class MockConfig:
    """Seeded synthetic sequences that a model can learn."""

    name: str = "mock"
    alphabet: int = 64
    noise: float = 0.1
    seed: int = 1234

    def __post_init__(self) -> None:
        _at_least("data.alphabet", self.alphabet, 2)
        _within("data.noise", self.noise, 0.0, 1.0)
        _at_least("data.seed", self.seed, 0)


@dataclass
class OptimizerConfig:
    """Megatron's Adam with FP32 master weights, and its learning-rate schedule."""

    name: str = "adam"
    lr: float = 2e-3
    min_lr: float = 2e-4
    lr_decay_style: str = "cosine"
    lr_warmup_steps: int | None = None
    lr_decay_steps: int | None = None
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    grad_reduce_in_fp32: bool = True

    def __post_init__(self) -> None:
        _one_of("optimizer.name", self.name, ("adam",))
        _one_of("optimizer.lr_decay_style", self.lr_decay_style, LR_DECAY_STYLES)
        for field in ("lr", "min_lr", "lr_warmup_steps", "weight_decay", "clip_grad", "adam_eps"):
            _at_least(f"optimizer.{field}", getattr(self, field), 0)
        _at_least("optimizer.lr_decay_steps", self.lr_decay_steps, 1)
        _within("optimizer.adam_beta1", self.adam_beta1, 0.0, 1.0)
        _within("optimizer.adam_beta2", self.adam_beta2, 0.0, 1.0)
        if self.min_lr > self.lr:
            raise ConfigError(
                f"optimizer.min_lr={self.min_lr:g} is above optimizer.lr={self.lr:g}.",
                key="optimizer.min_lr",
                value=self.min_lr,
                allowed=[f"<= {self.lr:g}"],
            )
        if self.overlap_param_gather and not (self.distributed_optimizer and self.overlap_grad_reduce):
            raise ConfigError(
                "optimizer.overlap_param_gather=true needs optimizer.distributed_optimizer=true and "
                "optimizer.overlap_grad_reduce=true.",
                key="optimizer.overlap_param_gather",
                value=True,
            )


@dataclass
class TrainingConfig:
    """How long, how much at a time, and what is kept."""

    name: str = "default"
    steps: int = 250
    micro_batch_size: int = 4
    global_batch_size: int = 4
    seed: int = 1234
    log_every: int = 1
    eval_batches: int = 8
    save_every: int = 0
    keep_checkpoints: int = 2
    resume: str | None = None
    stop_at_step: int | None = None
    packing_multiple: int | None = None
    """Sequences are packed to a number of tokens that is a multiple of this; None: no packing."""
    deterministic: bool = False
    distributed_timeout_minutes: int = 10

    def __post_init__(self) -> None:
        for field in ("steps", "micro_batch_size", "global_batch_size", "log_every"):
            _at_least(f"training.{field}", getattr(self, field), 1)
        for field in ("packing_multiple", "keep_checkpoints", "stop_at_step", "distributed_timeout_minutes"):
            _at_least(f"training.{field}", getattr(self, field), 1)
        for field in ("seed", "eval_batches", "save_every"):
            _at_least(f"training.{field}", getattr(self, field), 0)


DataConfig = StdlibTextConfig | MockConfig | MegatronIndexedConfig

# One schema a group; where the options of a group have different keys, one schema an option.
GROUPS: dict[str, type[Any] | dict[str, type[Any]]] = {
    "framework": FrameworkConfig,
    "model": ModelConfig,
    "data": {
        "stdlib_text": StdlibTextConfig,
        "mock": MockConfig,
        "megatron_indexed": MegatronIndexedConfig,
    },
    "optimizer": OptimizerConfig,
    "training": TrainingConfig,
}
