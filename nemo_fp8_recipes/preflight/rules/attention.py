"""Does FP8 attention find a backend?"""

from __future__ import annotations

from collections.abc import Iterator

from nemo_fp8_recipes.preflight.hardware import BLACKWELL
from nemo_fp8_recipes.preflight.inputs import PreflightInput
from nemo_fp8_recipes.preflight.registry import Problem, rule

_BACKEND = "transformer_engine/pytorch/attention/dot_product_attention/utils.py: get_attention_backend"
_OVERRIDE = "NVTE_DPA_FP8_RECIPE"


@rule(
    "FP8-ATT-001",
    "error",
    "no attention backend takes the recipe",
    source=_BACKEND,
    versions="transformer-engine >= 2.15",
)
def attention_backend(job: PreflightInput) -> Iterator[Problem]:
    if not getattr(job.recipe, "fp8_dpa", False) or job.environment.get(_OVERRIDE):
        return
    if job.recipe.name == "nvfp4":
        yield Problem(
            message="fp8_recipe.fp8_dpa=true finds no backend with nvfp4: TE has no FP4 attention.",
            key="fp8_recipe.fp8_dpa",
            value=True,
            fix=f"Set fp8_recipe.fp8_dpa=false, or {_OVERRIDE}=Float8CurrentScaling in the environment.",
        )
    elif job.recipe.name == "mxfp8" and getattr(job.recipe, "fp8_mha", False):
        yield Problem(
            message="fp8_recipe.fp8_mha=true has no backend with mxfp8: fused attention takes fp8_dpa only.",
            key="fp8_recipe.fp8_mha",
            value=True,
            fix="Set fp8_recipe.fp8_mha=false.",
        )


@rule(
    "FP8-ATT-002",
    "warning",
    "FP8 attention needs FlashAttention 3 on this GPU",
    source=_BACKEND,
    versions="transformer-engine >= 2.2",
)
def tensorwise_attention_below_blackwell(job: PreflightInput) -> Iterator[Problem]:
    capability = job.hardware.capability
    if job.recipe.name != "tensorwise" or capability is None or capability >= BLACKWELL:
        return
    if getattr(job.recipe, "fp8_dpa", False) and not job.environment.get(_OVERRIDE):
        yield Problem(
            message=f"On {job.hardware.display_name} fused attention has no current scaling, so "
            "fp8_recipe.fp8_dpa=true runs with FlashAttention 3 or not at all.",
            key="fp8_recipe.fp8_dpa",
            value=True,
            fix="Install FlashAttention 3, set fp8_recipe.fp8_dpa=false, or use fp8_recipe=delayed.",
        )
