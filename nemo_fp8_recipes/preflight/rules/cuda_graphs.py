"""Do CUDA graphs get along with the recipe, with probes and with what else is set?"""

from __future__ import annotations

from collections.abc import Iterator

from nemo_fp8_recipes.preflight.citation import core, megatron_lm
from nemo_fp8_recipes.preflight.inputs import PreflightInput
from nemo_fp8_recipes.preflight.registry import Problem, rule

_CONFIG = "transformer/transformer_config.py"
_SCOPE = "megatron.cuda_graph_scope"


@rule(
    "FP8-GRF-001",
    "error",
    "a scope that CUDA graphs cannot have",
    source=(
        core(_CONFIG, 1740, "To use full iteration cuda graph, please use"),
        core(_CONFIG, 1746, "cuda_graph_scope must not contain both moe and moe_router."),
        core(_CONFIG, 1750, "moe_preprocess cuda graph is only supported with moe_router cuda graph."),
        core(_CONFIG, 1755, "moe cuda graph is only supported for MoE."),
        core(_CONFIG, 1770, "moe cuda graph is only supported with drop-padding MoE."),
    ),
    versions="megatron-core >= 0.16",
    of_gpu=False,
)
def graph_scope(job: PreflightInput) -> Iterator[Problem]:
    megatron = job.megatron
    if megatron.cuda_graph_impl == "none":
        return
    scope = set(megatron.cuda_graph_scope)
    if megatron.cuda_graph_impl == "local" and scope & {"moe_router", "moe_preprocess"}:
        scope |= {"moe_router", "moe_preprocess"}  # as Megatron adds the one to the other
    if megatron.cuda_graph_impl == "transformer_engine" and "full_iteration" in scope:
        yield Problem(
            message="Transformer Engine's CUDA graphs hold layers, not full iterations.",
            key="megatron.cuda_graph_impl",
            value="transformer_engine",
            fix="Set megatron.cuda_graph_impl=local for full_iteration.",
        )
    if {"moe", "moe_router"} <= scope:
        yield Problem(
            message="CUDA graphs of moe hold moe_router too: one of them is asked for twice.",
            key=_SCOPE,
            value=list(megatron.cuda_graph_scope),
            fix="Take moe or moe_router out.",
        )
    if "moe_preprocess" in scope and "moe_router" not in scope:
        yield Problem(
            message="A CUDA graph of moe_preprocess starts at the router.",
            key=_SCOPE,
            value="moe_preprocess",
            fix="Add moe_router to megatron.cuda_graph_scope.",
        )
    if job.model is not None and not job.model.has_experts and scope & {"moe", "moe_router"}:
        yield Problem(
            message="megatron.cuda_graph_scope names parts of expert layers, and the model has none.",
            key=_SCOPE,
            value=list(megatron.cuda_graph_scope),
            fix="Take moe, moe_router and moe_preprocess out.",
        )
    elif job.model is not None and job.model.has_experts and "moe" in scope:
        yield Problem(
            message="A CUDA graph of whole expert layers needs experts of a fixed number of tokens "
            "(drop and pad), and here routing decides.",
            key=_SCOPE,
            value="moe",
            fix="Use moe_router and moe_preprocess instead of moe.",
        )


@rule(
    "FP8-GRF-002",
    "error",
    "recompute across a CUDA graph",
    source=(
        core(_CONFIG, 1784, "full recompute is only supported with full iteration CUDA graph."),
        core(_CONFIG, 1794, "moe recompute is not supported with moe_router CUDA graph with: "),
        core(_CONFIG, 1808, 'or "core_attn" not in self.recompute_modules'),
    ),
    versions="megatron-core >= 0.16",
    of_gpu=False,
)
def graph_and_recompute(job: PreflightInput) -> Iterator[Problem]:
    megatron = job.megatron
    if megatron.cuda_graph_impl == "none" or megatron.recompute_granularity is None:
        return
    scope = set(megatron.cuda_graph_scope)
    if megatron.recompute_granularity == "full":
        if scope != {"full_iteration"}:
            yield Problem(
                message="Full recompute goes with CUDA graphs of the full iteration only.",
                key="megatron.recompute_granularity",
                value="full",
                fix="Set megatron.cuda_graph_scope=[full_iteration], or recompute selectively.",
            )
        return
    if (
        megatron.cuda_graph_impl == "transformer_engine"
        and "moe" in megatron.recomputed
        and "moe_router" in scope
    ):
        yield Problem(
            message="Recomputing whole expert layers covers the router, which a CUDA graph holds.",
            key="megatron.recompute_modules",
            value="moe",
            fix="Take moe out of megatron.recompute_modules or moe_router out of megatron.cuda_graph_scope.",
        )
    whole = not scope or "full_iteration" in scope
    if job.attention_dropout and "core_attn" in megatron.recomputed and (whole or "attn" in scope):
        yield Problem(
            message="A CUDA graph cannot recompute attention with dropout: its random numbers are fixed.",
            key="model.attention_dropout",
            value=job.attention_dropout,
            fix="Set model.attention_dropout=0, or take core_attn out of megatron.recompute_modules.",
        )


@rule(
    "FP8-GRF-003",
    "warning",
    "probes see nothing of a replayed CUDA graph",
    source=(
        "Hooks of Python modules do not run when a CUDA graph is replayed",
        core(
            "transformer/cuda_graphs.py", 597, 'm.fp8_meta["recipe"] = FP8GlobalStateManager.get_fp8_recipe()'
        ),
    ),
    versions="megatron-core >= 0.12",
    of_gpu=False,
)
def graph_and_probes(job: PreflightInput) -> Iterator[Problem]:
    if job.megatron.cuda_graph_impl != "none" and job.telemetry and job.recipe.precision != "bf16":
        scale = "delayed scaling's history stays readable; " if job.recipe.name == "delayed" else ""
        yield Problem(
            message="Probes run in Python, and layers in CUDA graphs are replayed without it: their amax and "
            f"scales are not logged ({scale}what is missing is marked so).",
            key="megatron.cuda_graph_impl",
            value=job.megatron.cuda_graph_impl,
            fix="Set telemetry.enabled=false, or leave layers that you want to see out of "
            "megatron.cuda_graph_scope.",
        )


@rule(
    "FP8-GRF-004",
    "error",
    "a captured CUDA graph keeps its recipe",
    source=core(
        "transformer/cuda_graphs.py", 735, "self.fp8_recipe = FP8GlobalStateManager.get_fp8_recipe()"
    ),
    versions="megatron-core >= 0.12",
    of_gpu=False,
)
def graph_and_schedule(job: PreflightInput) -> Iterator[Problem]:
    if job.megatron.cuda_graph_impl != "none" and job.scheduled:
        yield Problem(
            message="The recipe changes during the job, and a captured CUDA graph goes on with the recipe "
            "that it was captured with.",
            key="megatron.cuda_graph_impl",
            value=job.megatron.cuda_graph_impl,
            fix="Set megatron.cuda_graph_impl=none, or one recipe for the whole job.",
        )


@rule(
    "FP8-GRF-005",
    "error",
    "CUDA graphs with expandable segments",
    source=megatron_lm("megatron/training/arguments.py", 1249, '"expandable_segments:True" not in os.getenv'),
    versions="Megatron-LM core_v0.15.0 and later",
    of_gpu=False,
)
def graph_and_allocator(job: PreflightInput) -> Iterator[Problem]:
    if job.megatron.cuda_graph_impl != "transformer_engine":
        return
    text = job.environment.get("PYTORCH_CUDA_ALLOC_CONF", "")
    if "expandable_segments:True" in text and job.environment.get("NCCL_GRAPH_REGISTER") != "0":
        yield Problem(
            message=f"PYTORCH_CUDA_ALLOC_CONF={text} makes NCCL read memory that moved, in CUDA graphs.",
            key="megatron.cuda_graph_impl",
            value="transformer_engine",
            fix="Set NCCL_GRAPH_REGISTER=0 in the environment, or take expandable_segments:True out.",
        )
