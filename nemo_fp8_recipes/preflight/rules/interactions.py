"""Settings that are fine alone and break together."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_fp8_recipes.preflight.inputs import PreflightInput
from nemo_fp8_recipes.preflight.registry import Problem, rule
from nemo_fp8_recipes.recipes import Delayed


@rule(
    "FP8-MIX-001",
    "error",
    "delayed scaling with save_original_input",
    source="megatron/core/transformer/transformer_layer.py and moe/experts.py: set_save_original_input",
    versions="megatron-core >= 0.15",
)
def delayed_saves_original_input(job: PreflightInput) -> Iterator[Problem]:
    if job.recipe.name != "delayed":
        return
    set_by = {"recompute_modules": ("layernorm", "moe_act"), "offload_modules": ("expert_fc1",)}
    saved = [(key, name) for key, modules in set_by.items() for name in modules if name in getattr(job, key)]
    for key, name in saved:
        yield Problem(
            message=f"With '{name}' in {key} Megatron keeps unquantised inputs (save_original_input), "
            "which TE refuses for delayed scaling: quantising them again would disturb the amax history.",
            key=key,
            value=name,
            fix=f"Take '{name}' out of {key}, or use fp8_recipe=tensorwise.",
        )


@rule(
    "FP8-MIX-002",
    "info",
    "a function of your own updates the scales",
    source="transformer_engine/pytorch/quantization.py: _amax_and_scale_update",
)
def own_scale_update(job: PreflightInput) -> Iterator[Problem]:
    recipe = job.recipe
    if not isinstance(recipe, Delayed):
        return
    for key in ("amax_compute_algo", "scaling_factor_compute_algo"):
        value = getattr(recipe, key)
        if value and ":" in value:
            yield Problem(
                message=f"fp8_recipe.{key}={value} replaces TE's fused scale update by an unfused one: "
                "slower, and other results for an amax of zero or NaN.",
                key=f"fp8_recipe.{key}",
                value=value,
            )
