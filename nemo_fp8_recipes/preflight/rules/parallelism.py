"""Can the model be cut this way, and do the BF16 layers fit?"""

from __future__ import annotations

from collections.abc import Iterator

from nemo_fp8_recipes.preflight.citation import core
from nemo_fp8_recipes.preflight.inputs import PreflightInput
from nemo_fp8_recipes.preflight.registry import Problem, rule
from nemo_fp8_recipes.recipes import QuantizedRecipe
from nemo_fp8_recipes.targets.versions import at_least

_CONFIG = "transformer/transformer_config.py"
FEWER_GROUPS_SINCE = "0.16"


@rule(
    "FP8-PAR-001",
    "error",
    "a size does not divide over the ranks",
    source=(
        core(_CONFIG, 926, "num_attention_heads ({self.num_attention_heads}) must be a multiple of"),
        core(_CONFIG, 944, "must be a multiple or divisor of"),
        core("transformer/moe/moe_layer.py", 101, "assert self.config.num_moe_experts % ep_size == 0"),
        core("utils.py", 468, "is not divisible by"),
    ),
    of_gpu=False,
)
def divides(job: PreflightInput) -> Iterator[Problem]:
    model, parallel = job.model, job.parallel
    if model is None:
        return
    sizes = [
        ("model.num_layers", model.num_layers, "parallel.pp", parallel.pp),
        ("model.num_attention_heads", model.num_attention_heads, "parallel.tp", parallel.tp),
        ("model.ffn_hidden_size", model.ffn_hidden_size, "parallel.tp", parallel.tp),
    ]
    if not _fewer_groups_allowed(job) or model.num_query_groups >= parallel.tp:
        sizes.append(("model.num_query_groups", model.num_query_groups, "parallel.tp", parallel.tp))
    elif parallel.tp % model.num_query_groups:
        yield Problem(
            message=f"parallel.tp={parallel.tp} is neither a multiple nor a divisor of "
            f"model.num_query_groups={model.num_query_groups}.",
            key="model.num_query_groups",
            value=model.num_query_groups,
            fix=f"Use a divisor of {parallel.tp}, or another parallel.tp.",
        )
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


def _fewer_groups_allowed(job: PreflightInput) -> bool:
    """Whether several ranks may share one group of keys and values."""
    version = job.megatron_core_version
    return version is None or at_least(version, FEWER_GROUPS_SINCE)


@rule(
    "FP8-PAR-002",
    "error",
    "expert parallelism without experts",
    source=core(_CONFIG, 1049, "num_moe_experts must be non None to use expert-parallel."),
    of_gpu=False,
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


@rule(
    "FP8-PLC-001",
    "error",
    "more BF16 layers than a pipeline stage has",
    source=(
        core(_CONFIG, 1005, "num_layers_at_start_in_bf16"),
        core(_CONFIG, 1014, "num_layers_at_end_in_bf16"),
    ),
    of_gpu=False,
)
def bf16_layers_fit(job: PreflightInput) -> Iterator[Problem]:
    if job.model is None or not isinstance(job.recipe, QuantizedRecipe) or not job.recipe.layers_in_bf16:
        return
    if job.recipe.precision != "fp8":
        return  # Megatron checks FP8 only; FP4 layers are left out by their number in the whole model
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
    of_gpu=False,
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
