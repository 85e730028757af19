"""Do the GEMMs of each rank have dimensions that the recipe takes?"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

from nemo_fp8_recipes.preflight.citation import Citation, engine, megatron_lm
from nemo_fp8_recipes.preflight.hardware import BLACKWELL, Capability, any_gemm_layout
from nemo_fp8_recipes.preflight.inputs import Hardware, PreflightInput
from nemo_fp8_recipes.preflight.registry import Problem, rule
from nemo_fp8_recipes.preflight.shapes import (
    EXECUTION,
    LEADING_DIMENSION,
    MXFP8_QUANTIZER,
    NVFP4_QUANTIZER,
    Demand,
    Linear,
    ModelShape,
    Parallel,
    linears,
    unmet,
)
from nemo_fp8_recipes.recipes import Recipe
from nemo_fp8_recipes.targets.versions import at_least

# Keys that change a dimension, the one to change first in front.
_TOKENS = ("seq_length", "micro_batch_size")
_PACKED_TOKENS = ("packing_multiple",)
_OUTPUT = {
    "self_attention.linear_qkv": ("num_attention_heads", "kv_channels"),
    "self_attention.linear_proj": ("hidden_size",),
    "mlp.linear_fc1": ("ffn_hidden_size",),
    "mlp.linear_fc2": ("hidden_size",),
    "mixer.in_proj": ("hybrid.mamba_num_heads", "hybrid.mamba_state_dim"),
    "mixer.out_proj": ("hidden_size",),
    "mlp.experts.linear_fc1": ("hybrid.expert_ffn_hidden_size",),
    "mlp.experts.linear_fc2": ("hidden_size",),
    "mlp.fc1_latent_proj": ("hybrid.moe_latent_size",),
    "mlp.fc2_latent_proj": ("hidden_size",),
    "mlp.shared_experts.linear_fc1": ("hybrid.shared_expert_ffn_hidden_size",),
    "mlp.shared_experts.linear_fc2": ("hidden_size",),
}
_INPUT = {
    "self_attention.linear_qkv": ("hidden_size",),
    "self_attention.linear_proj": ("num_attention_heads", "kv_channels"),
    "mlp.linear_fc1": ("hidden_size",),
    "mlp.linear_fc2": ("ffn_hidden_size",),
    "mixer.in_proj": ("hidden_size",),
    "mixer.out_proj": ("hybrid.mamba_num_heads", "hybrid.mamba_head_dim"),
    "mlp.experts.linear_fc1": ("hidden_size",),
    "mlp.experts.linear_fc2": ("hybrid.expert_ffn_hidden_size",),
    "mlp.fc1_latent_proj": ("hidden_size",),
    "mlp.fc2_latent_proj": ("hybrid.moe_latent_size",),
    "mlp.shared_experts.linear_fc1": ("hidden_size",),
    "mlp.shared_experts.linear_fc2": ("hybrid.shared_expert_ffn_hidden_size",),
}
_GROUP = {"micro_batch_size": "training", "packing_multiple": "training"}
_SEARCH = 8192


@rule(
    "FP8-SHP-001",
    "error",
    "a GEMM dimension that the recipe cannot take",
    source=(EXECUTION, MXFP8_QUANTIZER, NVFP4_QUANTIZER, LEADING_DIMENSION),
    versions="transformer-engine >= 2.0",
)
def gemm_dimensions(job: PreflightInput) -> Iterator[Problem]:
    if job.model is None:
        return
    capability = job.hardware.capability
    layout = BLACKWELL if capability is not None and any_gemm_layout(capability) else None
    yield from _problems(job.recipe, layout, job.model, job.parallel, job.elsewhere)


@functools.lru_cache(maxsize=512)
def _problems(
    recipe: Recipe,
    layout: Capability | None,
    model: ModelShape,
    parallel: Parallel,
    elsewhere: frozenset[str],
) -> tuple[Problem, ...]:
    """What is wrong on every GPU of this kind: of a GPU, GEMMs ask only which layouts it takes."""
    hardware = Hardware(capability=layout)
    return tuple(
        _unmet_dimensions(
            PreflightInput(
                recipe=recipe, hardware=hardware, model=model, parallel=parallel, elsewhere=elsewhere
            )
        )
    )


def _unmet_dimensions(job: PreflightInput) -> Iterator[Problem]:
    assert job.model is not None
    told: set[str] = set()
    found = list(_unmet(job, job.model))
    for linear, demand in sorted(found, key=lambda pair: -pair[1].multiple):
        keys = _keys(job.model, linear, demand)
        if keys[0] in told:
            continue  # the values offered put all its layers right
        told.add(keys[0])
        noun = demand.dimension.removeprefix("local ")
        ways = [way for key in keys if (way := _way_out(job, keys[0], key))]
        if demand.dimension in ("output features", "input features") and (way := _fewer_ranks(job, keys[0])):
            ways.append(way)
        yield Problem(
            message=f"{linear.name} has {linear.size(demand.dimension)} {noun} on each rank, and "
            f"fp8_recipe={job.recipe.name} needs a multiple of {demand.multiple}: {demand.reason}.",
            key=_dotted(keys[0]),
            value=job.model.value(keys[0]),
            fix=f"Nearest that work: {'; '.join(ways)}." if ways else "Change the model or its parallelism.",
            source=demand.source,
        )


def _keys(model: ModelShape, linear: Linear, demand: Demand) -> tuple[str, ...]:
    if demand.dimension in ("tokens", "local tokens"):
        return _TOKENS if model.packing_multiple is None else _PACKED_TOKENS
    return (_OUTPUT if demand.dimension == "output features" else _INPUT)[linear.name]


def _dotted(key: str) -> str:
    return f"{_GROUP.get(key, 'model')}.{key}"


def _way_out(job: PreflightInput, subject: str, key: str) -> str:
    """The nearest values of `key`, below and above, that put right everything that `subject` decides."""
    assert job.model is not None
    start = job.model.value(key)
    found = []
    for step in (-1, 1):
        for value in range(start + step, max(0, start + step * _SEARCH), step):
            if _right(job, subject, job.model.with_value(key, value)):
                found.append(str(value))
                break
    return f"{_dotted(key)}={' or '.join(found)}" if found else ""


def _fewer_ranks(job: PreflightInput, subject: str) -> str:
    """The largest smaller tensor parallelism at which the model as it is goes."""
    assert job.model is not None
    for tp in range(job.parallel.tp - 1, 0, -1):
        parallel = replace(job.parallel, tp=tp, sequence=job.parallel.sequence and tp > 1)
        if job.parallel.tp % tp == 0 and _right(replace(job, parallel=parallel), subject, job.model):
            return f"parallel.tp={tp}"
    return ""


def _right(job: PreflightInput, subject: str, model: ModelShape) -> bool:
    if model.kv_channels is None and model.hidden_size % model.num_attention_heads:
        return False
    if model.num_attention_heads % model.num_query_groups or not _divides(model, job):
        return False
    return all(_keys(model, linear, demand)[0] != subject for linear, demand in _unmet(job, model))


def _unmet(job: PreflightInput, model: ModelShape) -> Iterator[tuple[Linear, Demand]]:
    """What the job's recipe cannot take, of the linear layers that train with it."""
    for linear, demand in unmet(job.recipe, job.hardware.capability, model, job.parallel):
        if linear.name not in job.elsewhere:
            yield linear, demand


def _divides(model: ModelShape, job: PreflightInput) -> bool:
    tp, cp = job.parallel.tp, job.parallel.cp
    sequence = (tp if job.parallel.sequence else 1) * (2 * cp if cp > 1 else 1)
    mamba = model.hybrid is not None and (
        model.hybrid.mamba_num_heads % tp or model.hybrid.mamba_num_heads % model.hybrid.mamba_num_groups
    )
    dense = model.num_attention_heads % tp or model.ffn_hidden_size % tp or model.seq_length % sequence
    return not (dense or mamba)


@rule(
    "FP8-SHP-002",
    "warning",
    "the quantised all-gather falls back to BF16, or is refused",
    source=(
        engine("pytorch/distributed.py", 1148, "if not quantizer.is_quantizable(inp)"),
        Citation(
            "TransformerEngine",
            "v2.13",
            "transformer_engine/pytorch/utils.py",
            450,
            "def assert_dim_for_all_gather",
        ),
    ),
    versions="transformer-engine >= 2.3",
    of_gpu=False,
)
def blockwise_all_gather(job: PreflightInput) -> Iterator[Problem]:
    if job.model is None or job.recipe.name != "blockwise" or not job.parallel.sequence:
        return
    version = job.te_version
    refused = version is not None and at_least(version, "2.8") and not at_least(version, "2.14")
    for linear in linears(job.model, job.parallel):
        if linear.name == "mlp.linear_fc1" and (linear.local_tokens % 128 or linear.input_features % 128):
            done = f"TE {version} refuses to gather" if refused else "TE gathers"
            how = "" if refused else " in BF16"
            yield Problem(
                message=f"With {linear.local_tokens} tokens of {linear.input_features} features a rank, "
                f"{done} activations{how}: in FP8 it gathers whole 128-blocks only.",
                key="model.seq_length",
                value=job.model.seq_length,
                fix="Make tokens per rank and model.hidden_size multiples of 128"
                + (", or upgrade Transformer Engine to 2.14 or later." if refused else "."),
                severity="error" if refused else None,
            )


@rule(
    "FP8-SHP-003",
    "info",
    "the vocabulary is padded",
    source=megatron_lm("megatron/training/tokenizer/tokenizer.py", 122, "multiple = args.make_vocab"),
    of_gpu=False,
)
def padded_vocabulary(job: PreflightInput) -> Iterator[Problem]:
    if job.model is None:
        return
    padded = job.model.padded_vocabulary(job.parallel.tp)
    if padded != job.model.vocab_size:
        yield Problem(
            message=f"model.vocab_size={job.model.vocab_size} is padded to {padded} rows: a multiple of "
            f"model.make_vocab_size_divisible_by={job.model.make_vocab_size_divisible_by} x "
            f"parallel.tp={job.parallel.tp}. The output layer itself stays in BF16.",
            key="model.vocab_size",
            value=job.model.vocab_size,
        )
