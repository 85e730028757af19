"""The GEMMs of a model's layers on one rank, and what their dimensions must divide by.

A linear layer with tokens M, output features N and input features K runs fprop (inner dimension K), dgrad
(inner dimension N) and wgrad (inner dimension M). Embedding, output layer and the experts' router stay in
BF16 in Megatron.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from nemo_fp8_recipes.preflight.citation import Citation, engine, engine_cpp
from nemo_fp8_recipes.preflight.hardware import BLACKWELL, Capability, any_gemm_layout
from nemo_fp8_recipes.recipes import Recipe

__all__ = [
    "Demand",
    "Dimension",
    "HybridShape",
    "Linear",
    "ModelShape",
    "Parallel",
    "demands",
    "linears",
    "unmet",
]

Dimension = Literal["tokens", "local tokens", "output features", "input features"]


@dataclass(frozen=True, kw_only=True)
class HybridShape:
    """Sizes of the Mamba and expert layers.

    `layer_pattern` has a sign a layer: M Mamba-2, * attention, - MLP, E experts.
    """

    layer_pattern: str
    mamba_num_heads: int
    mamba_head_dim: int
    mamba_state_dim: int
    mamba_num_groups: int
    num_experts: int | None = None
    experts_per_token: int | None = None
    expert_ffn_hidden_size: int | None = None
    shared_expert_ffn_hidden_size: int | None = None
    moe_latent_size: int | None = None
    """Width that tokens are projected to before the routed experts, and back from after them."""

    @property
    def mamba_width(self) -> int:
        """Features that leave a Mamba layer's scan."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def mamba_inputs(self) -> int:
        """Output features of a Mamba layer's in_proj: z and x, B and C, and a step size a head."""
        return 2 * self.mamba_width + 2 * self.mamba_num_groups * self.mamba_state_dim + self.mamba_num_heads


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a model and its micro-batch, before they are cut."""

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
    hybrid: HybridShape | None = None
    """Layers of several kinds; None: attention and MLP in every layer."""
    make_vocab_size_divisible_by: int = 1
    """Megatron pads the vocabulary to a multiple of this times the tensor-parallel ranks."""
    packing_multiple: int | None = None
    """Sequences are packed, and the tokens of a micro-batch are some multiple of this; None: no packing."""

    @property
    def has_experts(self) -> bool:
        return self.hybrid is not None and self.hybrid.num_experts is not None

    def tokens_an_expert(self, parallel: Parallel) -> int:
        """Tokens of a micro-batch that an expert gets on average."""
        hybrid = self.hybrid
        if hybrid is None or not hybrid.num_experts or not hybrid.experts_per_token:
            return 0
        tokens = self.seq_length * self.micro_batch_size // parallel.cp
        # Every rank of an expert-parallel group sends its tokens, each to `experts_per_token` experts.
        return tokens * hybrid.experts_per_token // hybrid.num_experts * parallel.ep

    def padded_vocabulary(self, tp: int) -> int:
        """Rows of the embedding and of the output layer, over all ranks."""
        multiple = self.make_vocab_size_divisible_by * tp
        return -(-self.vocab_size // multiple) * multiple

    def layers(self, kind: Literal["*", "-", "M", "E"]) -> int:
        """How many layers have attention (*), an MLP (-), Mamba (M) or experts (E)."""
        if self.hybrid is not None:
            return self.hybrid.layer_pattern.count(kind)
        return self.num_layers if kind in "*-" else 0

    @property
    def head_size(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    def value(self, field: str) -> int:
        """A size by its key below `model`, such as hidden_size or hybrid.mamba_num_heads."""
        if field == "kv_channels":
            return self.head_size
        if field == "packing_multiple":
            return self.packing_multiple or 1
        if field.startswith("hybrid."):
            return int(getattr(self.hybrid, field.removeprefix("hybrid.")))
        return int(getattr(self, field))

    def with_value(self, field: str, value: int) -> ModelShape:
        """The same model with one size changed."""
        changes: dict[str, Any] = {field: value}
        if field.startswith("hybrid.") and self.hybrid is not None:
            inner: dict[str, Any] = {field.removeprefix("hybrid."): value}
            changes = {"hybrid": replace(self.hybrid, **inner)}
        return replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How a model is cut over ranks."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    sequence: bool = False


@dataclass(frozen=True)
class Linear:
    """One linear layer as a rank sees it.

    `tokens` enter its GEMMs; `local_tokens` are what the rank quantises before an all-gather over the
    sequence (fewer than `tokens` with sequence parallelism). `layers` counts how often the whole model has
    it; `copies` are the experts of a layer on this rank, whose `tokens` are an average that routing decides.
    """

    name: str
    tokens: int
    local_tokens: int
    output_features: int
    input_features: int
    layers: int = 1
    copies: int = 1
    routed: bool = False

    def size(self, dimension: Dimension) -> int:
        return int(getattr(self, dimension.replace(" ", "_")))


@dataclass(frozen=True)
class Demand:
    """A dimension must be a multiple of `multiple`; `reason` says why, `source` where TE says so."""

    dimension: Dimension
    multiple: int
    reason: str
    source: str | Citation


def linears(model: ModelShape, parallel: Parallel) -> list[Linear]:
    """Every kind of linear layer on one rank; sizes that do not divide are cut by rounding down."""
    return [
        linear
        for linear in (*_attention_and_mlp(model, parallel), *_hybrid(model, parallel))
        if linear.layers
    ]


def _tokens(model: ModelShape, parallel: Parallel) -> tuple[int, int]:
    """Tokens in a rank's GEMMs, and those that it quantises before an all-gather."""
    tokens = model.seq_length * model.micro_batch_size // parallel.cp
    return tokens, tokens // parallel.tp if parallel.sequence else tokens


def _attention_and_mlp(model: ModelShape, parallel: Parallel) -> Iterator[Linear]:
    tokens, local = _tokens(model, parallel)
    attention = model.num_attention_heads * model.head_size // parallel.tp
    groups = max(model.num_query_groups // parallel.tp, 1)
    ffn = model.ffn_hidden_size // parallel.tp
    fc1 = 2 * ffn if model.gated else ffn
    hidden, layers = model.hidden_size, model.layers("*")
    qkv = attention + 2 * groups * model.head_size
    yield Linear("self_attention.linear_qkv", tokens, local, qkv, hidden, layers)
    yield Linear("self_attention.linear_proj", tokens, local, hidden, attention, layers)
    yield Linear("mlp.linear_fc1", tokens, local, fc1, hidden, model.layers("-"))
    yield Linear("mlp.linear_fc2", tokens, local, hidden, ffn, model.layers("-"))


def _hybrid(model: ModelShape, parallel: Parallel) -> Iterator[Linear]:
    """Mamba's projections (megatron/core/ssm/mamba_mixer.py: MambaMixer.__init__) and the experts' MLPs."""
    hybrid = model.hybrid
    if hybrid is None:
        return
    tokens, local = _tokens(model, parallel)
    hidden, layers = model.hidden_size, model.layers("M")
    yield Linear("mixer.in_proj", tokens, local, hybrid.mamba_inputs // parallel.tp, hidden, layers)
    yield Linear("mixer.out_proj", tokens, local, hidden, hybrid.mamba_width // parallel.tp, layers)
    layers = model.layers("E")
    if hybrid.num_experts and hybrid.expert_ffn_hidden_size and hybrid.experts_per_token:
        each = model.tokens_an_expert(parallel)
        copies, ffn = hybrid.num_experts // parallel.ep, hybrid.expert_ffn_hidden_size
        fc1 = 2 * ffn if model.gated else ffn
        width = hybrid.moe_latent_size or hidden
        yield Linear("mlp.experts.linear_fc1", each, each, fc1, width, layers, copies, routed=True)
        yield Linear("mlp.experts.linear_fc2", each, each, width, ffn, layers, copies, routed=True)
        if hybrid.moe_latent_size:
            # Not cut over the ranks: moe_layer.py gives them parallel_mode="duplicated".
            yield Linear("mlp.fc1_latent_proj", local, local, width, hidden, layers)
            yield Linear("mlp.fc2_latent_proj", local, local, hidden, width, layers)
    if hybrid.shared_expert_ffn_hidden_size:
        ffn = hybrid.shared_expert_ffn_hidden_size // parallel.tp
        fc1 = 2 * ffn if model.gated else ffn
        yield Linear("mlp.shared_experts.linear_fc1", tokens, local, fc1, hidden, layers)
        yield Linear("mlp.shared_experts.linear_fc2", tokens, local, hidden, ffn, layers)


EXECUTION = engine("pytorch/utils.py", 710, "FP8 execution requires the product of all dimensions")
LEADING_DIMENSION = engine_cpp(
    "common/gemm/cublaslt_gemm.cu", 162, "Leading dimension requirement on A for FP8 GEMM"
)
BLOCKWISE_GEMM = engine_cpp(
    "common/gemm/cublaslt_gemm.cu", 210, "Leading dimension requirement on NVTE_BLOCK_SCALING GEMM"
)
MXFP8_QUANTIZER = engine_cpp("pytorch/csrc/quantizer.cpp", 1492, "flat_first_dim % MXFP8_BLOCK_SIZE == 0")
NVFP4_QUANTIZER = engine_cpp("pytorch/csrc/quantizer.cpp", 1957, "First dim for NVFP4 must be divisible by")
CUBLAS_FP8 = (
    "cuBLAS documentation: FP8 matrix multiplication, 16-byte aligned leading dimensions (TE runs block "
    "scaling as MXFP8 there and has no check of its own)"
)
CUBLAS_FP4 = (
    "cuBLAS documentation: block-scaled FP4 matrix multiplication, 16-byte aligned leading dimensions "
    "(TE has no check of its own)"
)


def demands(recipe: Recipe, capability: Capability | None) -> Iterator[Demand]:
    """What every linear layer must satisfy; of an unknown device, the strictest that the recipe runs on."""
    if recipe.precision == "bf16":
        return
    yield Demand("local tokens", 8, "TE quantises no other leading dimension", EXECUTION)
    yield Demand("output features", 8, "TE quantises no other leading dimension", EXECUTION)
    yield Demand("input features", 16, "TE quantises no other last dimension", EXECUTION)
    if recipe.name in ("mxfp8", "nvfp4"):
        block, quantizer = (32, MXFP8_QUANTIZER) if recipe.name == "mxfp8" else (16, NVFP4_QUANTIZER)
        quantised: tuple[Dimension, ...] = ("local tokens", "output features", "input features")
        for dimension in quantised:
            yield Demand(dimension, block, f"blocks of {block} must be whole", quantizer)
        if recipe.name == "nvfp4":
            yield from _fp4_gemm_demands(recipe)
        return
    yield from _gemm_demands(recipe, capability)


def _gemm_demands(recipe: Recipe, capability: Capability | None) -> Iterator[Demand]:
    """Leading dimensions of the three GEMMs, in FP8 elements; with backward_override only fprop is FP8."""
    backward = recipe.operands().get("grad_output") is not None
    if not backward:
        return
    per_tensor = recipe.name in ("delayed", "tensorwise")
    source: str | Citation = LEADING_DIMENSION if per_tensor else BLOCKWISE_GEMM
    if not per_tensor and capability is not None and capability >= BLACKWELL:
        source = CUBLAS_FP8
    yield Demand("output features", 16, "they are the inner dimension of the dgrad GEMM", source)
    if not per_tensor or capability is None or not any_gemm_layout(capability):
        yield Demand("tokens", 16, "they are the inner dimension of the wgrad GEMM", source)


def _fp4_gemm_demands(recipe: Recipe) -> Iterator[Demand]:
    """The inner dimension of each GEMM: leading dimensions of 16 bytes are 32 FP4 values."""
    yield Demand("input features", 32, "they are the inner dimension of the fprop GEMM", CUBLAS_FP4)
    if recipe.operands().get("grad_output") is not None:
        yield Demand("output features", 32, "they are the inner dimension of the dgrad GEMM", CUBLAS_FP4)
        yield Demand("tokens", 32, "they are the inner dimension of the wgrad GEMM", CUBLAS_FP4)


def unmet(
    recipe: Recipe, capability: Capability | None, model: ModelShape, parallel: Parallel
) -> Iterator[tuple[Linear, Demand]]:
    """Every linear layer's dimensions that the recipe cannot take, only the largest multiple of each.

    How many tokens an expert gets, routing decides; Megatron pads them itself
    (megatron/core/transformer/moe/experts.py: TEGroupedMLP, Fp8Padding).
    """
    largest: dict[Dimension, Demand] = {}
    for demand in demands(recipe, capability):
        known = largest.get(demand.dimension)
        if known is None or demand.multiple > known.multiple:
            largest[demand.dimension] = demand
    if model.packing_multiple is not None:
        # Any number of whole multiples may come: what one holds decides.
        model = replace(model, seq_length=model.packing_multiple, micro_batch_size=1)
    for linear in linears(model, parallel):
        for demand in largest.values():
            padded = linear.routed and demand.dimension in ("tokens", "local tokens")
            if not padded and linear.size(demand.dimension) % demand.multiple:
                yield linear, demand
