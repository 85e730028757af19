"""The group `megatron`: what preflight looks at in Megatron's own configuration beside the recipe.

Every key is a field of that name of Megatron-Core's TransformerConfig, or of its OptimizerConfig and
DistributedDataParallelConfig. Imports no torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

from nemo_fp8_recipes.errors import ConfigError, nearest

__all__ = ["CUDA_GRAPH_SCOPES", "OFFLOAD_MODULES", "RECOMPUTE_MODULES", "MegatronSettings"]

# megatron/core/transformer/transformer_config.py and enums.py: CudaGraphScope, in 0.16.1.
RECOMPUTE_MODULES = ("core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts")
OFFLOAD_MODULES = ("core_attn", "attn_proj", "expert_fc1", "moe_act", "attn_norm", "mlp_norm", "qkv_linear")
CUDA_GRAPH_SCOPES = ("full_iteration", "attn", "mlp", "moe", "moe_router", "moe_preprocess", "mamba")

_CHOICES = {
    "recompute_modules": RECOMPUTE_MODULES,
    "offload_modules": OFFLOAD_MODULES,
    "cuda_graph_scope": CUDA_GRAPH_SCOPES,
}


@dataclass(frozen=True, kw_only=True)
class MegatronSettings:
    """Fields that the recipe has to get along with; the defaults are Megatron's, experts as Nemotron's."""

    name: str = "default"
    recompute_granularity: Literal["full", "selective"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: int | None = None
    recompute_modules: tuple[str, ...] = ("core_attn",)
    """Read with recompute_granularity=selective."""
    fine_grained_activation_offloading: bool = False
    offload_modules: tuple[str, ...] = ()
    cuda_graph_impl: Literal["none", "local", "transformer_engine"] = "none"
    cuda_graph_scope: tuple[str, ...] = ()
    """What the graphs hold; empty: whole layers."""
    tp_comm_overlap: bool = False
    cp_comm_type: Literal["p2p", "all_gather", "a2a", "a2a+p2p"] | None = None
    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex"] = "alltoall"
    moe_grouped_gemm: bool = True
    moe_router_padding_for_quantization: bool = False
    reuse_grad_buf_for_mxfp8_param_ag: bool = False

    def __post_init__(self) -> None:
        for key, allowed in _CHOICES.items():
            for word in getattr(self, key):
                if word not in allowed:
                    close = nearest(word, allowed)
                    raise ConfigError(
                        f"megatron.{key} has no '{word}'.",
                        key=f"megatron.{key}",
                        value=word,
                        allowed=allowed,
                        hint=f"Did you mean '{close}'?" if close else None,
                    )
        if self.recompute_num_layers is not None and self.recompute_num_layers < 1:
            raise ConfigError(
                f"megatron.recompute_num_layers={self.recompute_num_layers} is out of range.",
                key="megatron.recompute_num_layers",
                value=self.recompute_num_layers,
                allowed=[">= 1"],
            )

    @property
    def recomputed(self) -> tuple[str, ...]:
        """The modules that are run again in the backward pass; empty without selective recompute."""
        return self.recompute_modules if self.recompute_granularity == "selective" else ()

    @property
    def offloaded(self) -> tuple[str, ...]:
        """The modules whose inputs wait in the CPU's memory."""
        return self.offload_modules if self.fine_grained_activation_offloading else ()

    def transformer_fields(self) -> dict[str, Any]:
        """The fields of TransformerConfig that differ from this class's defaults."""
        elsewhere = ("name", "reuse_grad_buf_for_mxfp8_param_ag")
        changed = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in elsewhere and getattr(self, field.name) != field.default
        }
        return {key: list(value) if isinstance(value, tuple) else value for key, value in changed.items()}

    @classmethod
    def read(cls, transformer: Any, *, ddp: Any = None, optimizer: Any = None) -> MegatronSettings:
        """These settings as they stand in Megatron's own config objects, whoever set them and when.

        Args:
            transformer: a TransformerConfig; a field that its release does not have keeps the default.
            ddp: a DistributedDataParallelConfig.
            optimizer: an OptimizerConfig.

        Raises:
            ConfigError: a field holds a value that Megatron does not have.
        """
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            for source in (transformer, ddp, optimizer):
                value = getattr(source, field.name, None)
                if field.name == "name" or value is None:
                    continue
                values[field.name] = _plain(value)
                break
        scope = values.get("cuda_graph_scope")
        if isinstance(scope, str):  # "full", or a list with commas, before Megatron's check has split it
            values["cuda_graph_scope"] = () if scope == "full" else tuple(scope.split(","))
        asked = bool(values.get("offload_modules"))
        for key, known in _CHOICES.items():
            # Another release may have names that no rule here asks about.
            if key in values:
                values[key] = tuple(word for word in values[key] if word in known)
        if asked and not values["offload_modules"]:
            values["fine_grained_activation_offloading"] = False
        return cls(**values)


def _plain(value: Any) -> Any:
    """Enums by name, lists as tuples."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list | tuple):
        return tuple(_plain(item) for item in value)
    return value
