"""Can the model be cut this way, and do the BF16 layers fit?"""

from __future__ import annotations

from collections.abc import Iterator

from nemo_fp8_recipes.preflight.inputs import PreflightInput
from nemo_fp8_recipes.preflight.registry import Problem, rule
from nemo_fp8_recipes.recipes import QuantizedRecipe

_CONFIG = "megatron/core/transformer/transformer_config.py: __post_init__"


@rule("FP8-PAR-001", "error", "a size does not divide over the ranks", source=_CONFIG)
def divides(job: PreflightInput) -> Iterator[Problem]:
    model, parallel = job.model, job.parallel
    if model is None:
        return
    sizes = [
        ("model.num_layers", model.num_layers, "parallel.pp", parallel.pp),
        ("model.num_attention_heads", model.num_attention_heads, "parallel.tp", parallel.tp),
        ("model.num_query_groups", model.num_query_groups, "parallel.tp", parallel.tp),
        ("model.ffn_hidden_size", model.ffn_hidden_size, "parallel.tp", parallel.tp),
        ("model.vocab_size", model.vocab_size, "parallel.tp", parallel.tp),
    ]
    if model.hybrid is not None:
        for name in ("mamba_num_heads", "mamba_num_groups"):
            sizes.append((f"model.hybrid.{name}", getattr(model.hybrid, name), "parallel.tp", parallel.tp))
        if model.hybrid.num_experts is not None:
            sizes.append(("model.hybrid.num_experts", model.hybrid.num_experts, "parallel.ep", parallel.ep))
    if parallel.sequence:
        sizes.append(("model.seq_length", model.seq_length, "parallel.tp", parallel.tp))
    if parallel.cp > 1:
        sizes.append(("model.seq_length", model.seq_length, "2 x parallel.cp", 2 * parallel.cp))
    for key, value, divisor_key, divisor in sizes:
        if value % divisor:
            yield Problem(
                message=f"{key}={value} does not divide by {divisor_key}={divisor}.",
                key=key,
                value=value,
                fix=f"Use a multiple of {divisor}, or another {divisor_key.removeprefix('2 x ')}.",
            )


@rule(
    "FP8-PAR-002",
    "error",
    "expert parallelism without experts",
    source="megatron/core/transformer/transformer_config.py: __post_init__, line 1048 in 0.16.1",
)
def experts_to_cut(job: PreflightInput) -> Iterator[Problem]:
    if job.model is None or job.parallel.ep == 1:
        return
    if job.model.hybrid is None or job.model.hybrid.num_experts is None:
        yield Problem(
            message=f"parallel.ep={job.parallel.ep} cuts experts over ranks, and the model has none.",
            key="parallel.ep",
            value=job.parallel.ep,
            fix="Set parallel.ep=1.",
        )


@rule("FP8-PLC-001", "error", "more BF16 layers than a pipeline stage has", source=_CONFIG)
def bf16_layers_fit(job: PreflightInput) -> Iterator[Problem]:
    if job.model is None or not isinstance(job.recipe, QuantizedRecipe) or not job.recipe.layers_in_bf16:
        return
    most = job.model.num_layers // job.parallel.pp
    for key in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        value = getattr(job.recipe, key)
        if value > most:
            yield Problem(
                message=f"fp8_recipe.{key}={value}, and a pipeline stage has {most} layers.",
                key=f"fp8_recipe.{key}",
                value=value,
                fix=f"Set it to {most} or less.",
            )


@rule(
    "FP8-PLC-002",
    "error",
    "no layer is left to quantise",
    source="nemo_fp8_recipes: FP8 asked for and not applied",
)
def something_quantised(job: PreflightInput) -> Iterator[Problem]:
    if job.model is None or not isinstance(job.recipe, QuantizedRecipe):
        return
    if job.recipe.layers_in_bf16 >= job.model.num_layers:
        yield Problem(
            message=f"All {job.model.num_layers} layers stay in BF16: fp8_recipe={job.recipe.name} quantises "
            "nothing.",
            key="fp8_recipe.num_layers_at_start_in_bf16",
            value=job.recipe.num_layers_at_start_in_bf16,
            fix="Leave fewer layers in BF16, or use fp8_recipe=bf16.",
        )
