"""The GEMMs of a dense GPT layer on one rank, and what their dimensions must divide by.

A linear layer with tokens M, output features N and input features K runs fprop (inner dimension K), dgrad
(inner dimension N) and wgrad (inner dimension M). Embedding and output layer stay in BF16 in Megatron.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from nemo_fp8_recipes.preflight.hardware import Capability, any_gemm_layout
from nemo_fp8_recipes.recipes import Recipe

__all__ = ["Demand", "Dimension", "Linear", "ModelShape", "Parallel", "demands", "linears", "unmet"]

Dimension = Literal["tokens", "local tokens", "output features", "input features"]


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a dense GPT model and its micro-batch, before they are cut."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int | None
    vocab_size: int
    seq_length: int
    micro_batch_size: int
    gated: bool = False
    """Gated MLPs (SwiGLU) double the output features of fc1."""

    @property
    def head_size(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    def with_value(self, field: str, value: int) -> ModelShape:
        """The same model with one size changed."""
        changes: dict[str, Any] = {field: value}
        return replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How a model is cut over ranks."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    sequence: bool = False


@dataclass(frozen=True)
class Linear:
    """One linear layer as a rank sees it.

    `tokens` enter its GEMMs; `local_tokens` are what the rank quantises before an all-gather over the
    sequence (fewer than `tokens` with sequence parallelism).
    """

    name: str
    tokens: int
    local_tokens: int
    output_features: int
    input_features: int

    def size(self, dimension: Dimension) -> int:
        return int(getattr(self, dimension.replace(" ", "_")))


@dataclass(frozen=True)
class Demand:
    """A dimension must be a multiple of `multiple`; `reason` says why, `source` where TE says so."""

    dimension: Dimension
    multiple: int
    reason: str
    source: str


def linears(model: ModelShape, parallel: Parallel) -> list[Linear]:
    """qkv, proj, fc1 and fc2 of a layer on one rank; sizes that do not divide are cut by rounding down."""
    tokens = model.seq_length * model.micro_batch_size // parallel.cp
    local = tokens // parallel.tp if parallel.sequence else tokens
    attention = model.num_attention_heads * model.head_size // parallel.tp
    groups = max(model.num_query_groups // parallel.tp, 1)
    ffn = model.ffn_hidden_size // parallel.tp
    fc1 = 2 * ffn if model.gated else ffn
    hidden = model.hidden_size
    return [
        Linear("self_attention.linear_qkv", tokens, local, attention + 2 * groups * model.head_size, hidden),
        Linear("self_attention.linear_proj", tokens, local, hidden, attention),
        Linear("mlp.linear_fc1", tokens, local, fc1, hidden),
        Linear("mlp.linear_fc2", tokens, local, hidden, ffn),
    ]


_EXECUTION = "transformer_engine/pytorch/utils.py: assert_dim_for_fp8_exec"
_CUBLAS = "transformer_engine/common/gemm/cublaslt_gemm.cu: CanonicalizeGemmInput"
_QUANTIZER = "transformer_engine/pytorch/csrc/quantizer.cpp: {}::create_tensor"


def demands(recipe: Recipe, capability: Capability | None) -> Iterator[Demand]:
    """What every linear layer must satisfy; of an unknown device, the strictest that the recipe runs on."""
    if recipe.precision == "bf16":
        return
    yield Demand("local tokens", 8, "TE quantises no other leading dimension", _EXECUTION)
    yield Demand("output features", 8, "TE quantises no other leading dimension", _EXECUTION)
    yield Demand("input features", 16, "TE quantises no other last dimension", _EXECUTION)
    if recipe.name in ("mxfp8", "nvfp4"):
        block, quantizer = (32, "MXFP8Quantizer") if recipe.name == "mxfp8" else (16, "NVFP4Quantizer")
        quantised: tuple[Dimension, ...] = ("local tokens", "output features", "input features")
        for dimension in quantised:
            yield Demand(dimension, block, f"blocks of {block} must be whole", _QUANTIZER.format(quantizer))
        return
    yield from _gemm_demands(recipe, capability)


def _gemm_demands(recipe: Recipe, capability: Capability | None) -> Iterator[Demand]:
    """Leading dimensions of the three GEMMs, in FP8 elements; with backward_override only fprop is FP8."""
    backward = recipe.operands().get("grad_output") is not None
    if not backward:
        return
    per_tensor = recipe.name in ("delayed", "tensorwise")
    yield Demand("output features", 16, "they are the inner dimension of the dgrad GEMM", _CUBLAS)
    if not per_tensor or capability is None or not any_gemm_layout(capability):
        yield Demand("tokens", 16, "they are the inner dimension of the wgrad GEMM", _CUBLAS)


def unmet(
    recipe: Recipe, capability: Capability | None, model: ModelShape, parallel: Parallel
) -> Iterator[tuple[Linear, Demand]]:
    """Every linear layer's dimensions that the recipe cannot take, only the largest multiple of each."""
    largest: dict[Dimension, Demand] = {}
    for demand in demands(recipe, capability):
        known = largest.get(demand.dimension)
        if known is None or demand.multiple > known.multiple:
            largest[demand.dimension] = demand
    for linear in linears(model, parallel):
        for demand in largest.values():
            if linear.size(demand.dimension) % demand.multiple:
                yield linear, demand
