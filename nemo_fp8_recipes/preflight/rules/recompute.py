"""Do activation recompute and offloading fit together, and with the recipe?"""

from __future__ import annotations

from collections.abc import Iterator

from nemo_fp8_recipes.preflight.citation import core, engine
from nemo_fp8_recipes.preflight.inputs import PreflightInput
from nemo_fp8_recipes.preflight.registry import Problem, rule
from nemo_fp8_recipes.targets.versions import at_least

_CONFIG = "transformer/transformer_config.py"
SELECTIVE_SINCE = "2.6"


@rule(
    "FP8-MIX-001",
    "error",
    "delayed scaling with save_original_input",
    source=(
        engine("pytorch/module/linear.py", 422, "DelayedScaling recipe is not supported with save_original"),
        core(_CONFIG, 1245, "Delayed scaling does not support moe_act and layernorm recompute"),
        core("transformer/transformer_layer.py", 444, "set_save_original_input(self.mlp.linear_fc1)"),
        core("transformer/moe/experts.py", 601, "set_save_original_input(self.linear_fc1)"),
    ),
    versions="megatron-core >= 0.13",
    of_gpu=False,
)
def delayed_saves_original_input(job: PreflightInput) -> Iterator[Problem]:
    if job.recipe.name != "delayed":
        return
    saved: list[tuple[str, str]] = [
        ("recompute_modules", name) for name in ("layernorm", "moe_act") if name in job.megatron.recomputed
    ]
    if "expert_fc1" in job.megatron.offloaded and _experts(job) is not False:
        saved.append(("offload_modules", "expert_fc1"))
    for key, name in saved:
        yield Problem(
            message=f"With '{name}' in {key} Megatron keeps unquantised inputs (save_original_input), "
            "which TE refuses for delayed scaling: quantising them again would disturb the amax history.",
            key=f"megatron.{key}",
            value=name,
            fix=f"Take '{name}' out of megatron.{key}, or use fp8_recipe=tensorwise.",
        )


def _experts(job: PreflightInput) -> bool | None:
    """Whether the model has routed experts; None: no model is known."""
    return None if job.model is None else job.model.has_experts


@rule(
    "FP8-RCP-001",
    "error",
    "recompute settings that contradict each other",
    source=(
        core(_CONFIG, 1169, "recompute_method must be"),
        core(_CONFIG, 1175, "recompute_num_layers must be between"),
        core(_CONFIG, 1184, "recompute_num_layers must be None."),
        core(_CONFIG, 1215, "moe_act in recompute_modules is only supported with moe_grouped_gemm"),
    ),
    versions="megatron-core >= 0.12",
    of_gpu=False,
)
def recompute_settings(job: PreflightInput) -> Iterator[Problem]:
    megatron = job.megatron
    if megatron.recompute_granularity == "full":
        if megatron.recompute_method is None:
            yield Problem(
                message="megatron.recompute_granularity=full does not say which layers are recomputed.",
                key="megatron.recompute_method",
                fix="Set megatron.recompute_method=uniform or block.",
            )
        if megatron.recompute_num_layers is None:
            yield Problem(
                message="megatron.recompute_granularity=full does not say how many layers are recomputed at "
                "a time.",
                key="megatron.recompute_num_layers",
                fix="Set megatron.recompute_num_layers, such as 1.",
            )
    elif megatron.recompute_granularity == "selective" and megatron.recompute_num_layers is not None:
        yield Problem(
            message="megatron.recompute_num_layers belongs to full recompute, and granularity is selective.",
            key="megatron.recompute_num_layers",
            value=megatron.recompute_num_layers,
            fix="Set megatron.recompute_num_layers=null.",
        )
    if "moe_act" in megatron.recomputed and not megatron.moe_grouped_gemm:
        yield Problem(
            message="Megatron recomputes the activation of experts (moe_act) in grouped GEMMs only.",
            key="megatron.recompute_modules",
            value="moe_act",
            fix="Set megatron.moe_grouped_gemm=true, or take moe_act out.",
        )
    if "mla_up_proj" in megatron.recomputed and job.model is not None:
        yield Problem(
            message="mla_up_proj is a part of multi-latent attention, and the model has none.",
            key="megatron.recompute_modules",
            value="mla_up_proj",
            fix="Take mla_up_proj out of megatron.recompute_modules.",
            source=core(_CONFIG, 1220, "mla_up_proj in recompute_modules is only supported with"),
        )


@rule(
    "FP8-RCP-002",
    "error",
    "recomputing a norm or an activation needs a newer Transformer Engine",
    source=core(_CONFIG, 1250, "moe_act and layernorm recompute for fp8 needs"),
    versions="megatron-core >= 0.13",
    of_gpu=False,
)
def recompute_needs_engine(job: PreflightInput) -> Iterator[Problem]:
    if job.recipe.precision != "fp8" or job.te_version is None or at_least(job.te_version, SELECTIVE_SINCE):
        return
    for name in ("layernorm", "moe_act"):
        if name in job.megatron.recomputed:
            yield Problem(
                message=f"Recomputing '{name}' in FP8 needs Transformer Engine {SELECTIVE_SINCE}, and the "
                f"job finds {job.te_version}.",
                key="megatron.recompute_modules",
                value=name,
                fix=f"Upgrade Transformer Engine, or take '{name}' out.",
            )


@rule(
    "FP8-RCP-003",
    "error",
    "offloading settings that contradict each other",
    source=(
        core(_CONFIG, 1272, "assert self.offload_modules is not None"),
        core(_CONFIG, 1289, "attn_proj cannot be set to offload_modules alone"),
    ),
    versions="megatron-core >= 0.16",
    of_gpu=False,
)
def offload_settings(job: PreflightInput) -> Iterator[Problem]:
    megatron = job.megatron
    if megatron.fine_grained_activation_offloading and not megatron.offload_modules:
        yield Problem(
            message="megatron.fine_grained_activation_offloading=true, and nothing is named to offload.",
            key="megatron.offload_modules",
            value=[],
            fix="Name what to offload, such as megatron.offload_modules=[core_attn].",
        )
    if "attn_proj" in megatron.offloaded and "core_attn" not in megatron.offloaded:
        yield Problem(
            message="megatron.offload_modules has attn_proj without core_attn, whose output attn_proj reads.",
            key="megatron.offload_modules",
            value="attn_proj",
            fix="Add core_attn to megatron.offload_modules.",
        )
