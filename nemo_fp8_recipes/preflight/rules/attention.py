"""Does FP8 attention find a backend for training?"""

from __future__ import annotations

from collections.abc import Iterator

from nemo_fp8_recipes.preflight.citation import engine
from nemo_fp8_recipes.preflight.hardware import BLACKWELL
from nemo_fp8_recipes.preflight.inputs import PreflightInput
from nemo_fp8_recipes.preflight.registry import Problem, rule

_UTILS = "pytorch/attention/dot_product_attention/utils.py"
_OVERRIDE = "NVTE_DPA_FP8_RECIPE"
_OFF = "fp8_recipe.fp8_dpa=false"
SM120 = (12, 0)


def _in_attention(job: PreflightInput) -> bool:
    """Whether attention itself runs in the recipe's FP8, as far as the configuration decides it."""
    return bool(getattr(job.recipe, "fp8_dpa", False)) and not job.environment.get(_OVERRIDE)


@rule(
    "FP8-ATT-001",
    "error",
    "no attention backend takes the recipe",
    source=(
        engine(_UTILS, 793, "Disabling FusedAttention for %s"),
        engine(_UTILS, 779, "Disabling FusedAttention for MXFP8 with fp8_mha=True"),
    ),
    versions="transformer-engine >= 2.15",
)
def attention_backend(job: PreflightInput) -> Iterator[Problem]:
    if not _in_attention(job):
        return
    if job.recipe.name == "nvfp4":
        yield Problem(
            message="fp8_recipe.fp8_dpa=true finds no backend with nvfp4: TE has no FP4 attention.",
            key="fp8_recipe.fp8_dpa",
            value=True,
            fix=f"Set {_OFF}, or {_OVERRIDE}=Float8CurrentScaling in the environment.",
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
    "error",
    "no attention backend trains with current scaling on this GPU",
    source=(
        engine(_UTILS, 759, "Disabling FusedAttention for FP8 current scaling on arch < sm100"),
        engine(_UTILS, 730, "Disabling FlashAttention 3 for FP8 training"),
    ),
    versions="transformer-engine >= 2.4",
)
def tensorwise_attention_below_blackwell(job: PreflightInput) -> Iterator[Problem]:
    capability = job.hardware.capability
    if job.recipe.name != "tensorwise" or capability is None or capability >= BLACKWELL:
        return
    if _in_attention(job):
        yield Problem(
            message=f"On {job.hardware.display_name} fused attention has no current scaling, and "
            "FlashAttention 3 does not train in FP8: fp8_recipe.fp8_dpa=true finds no backend.",
            key="fp8_recipe.fp8_dpa",
            value=True,
            fix=f"Set {_OFF}, use fp8_recipe=delayed, or {_OVERRIDE}=DelayedScaling in the environment.",
        )


@rule(
    "FP8-ATT-003",
    "error",
    "no FP8 attention on this GPU",
    source=engine(_UTILS, 800, " for compute capability = sm120"),
    versions="transformer-engine >= 2.9",
)
def attention_on_sm120(job: PreflightInput) -> Iterator[Problem]:
    if _in_attention(job) and job.hardware.capability == SM120:
        yield Problem(
            message=f"TE has no FP8 attention for {job.hardware.display_name} (compute capability 12.0).",
            key="fp8_recipe.fp8_dpa",
            value=True,
            fix=f"Set {_OFF}.",
        )


@rule(
    "FP8-ATT-004",
    "error",
    "MXFP8 attention with packed sequences",
    source=engine(_UTILS, 790, "Disabling FusedAttention for MXFP8 with qkv_format = thd"),
    versions="transformer-engine >= 2.15",
)
def packed_mxfp8_attention(job: PreflightInput) -> Iterator[Problem]:
    packed = job.model is not None and job.model.packing_multiple is not None
    if packed and job.recipe.name == "mxfp8" and _in_attention(job):
        yield Problem(
            message="fp8_recipe.fp8_dpa=true has no backend for packed sequences (thd) with mxfp8.",
            key="fp8_recipe.fp8_dpa",
            value=True,
            fix=f"Set {_OFF}, or do not pack sequences.",
        )


@rule(
    "FP8-ATT-005",
    "info",
    "FP8 attention depends on cuDNN",
    source=(
        engine(_UTILS, 764, "Disabling FusedAttention for FP8 current scaling with cuDNN < 9.14.0"),
        engine(_UTILS, 783, "Disabling FusedAttention for MXFP8 with cuDNN < 9.21.0"),
    ),
    versions="transformer-engine >= 2.15",
)
def cudnn_for_attention(job: PreflightInput) -> Iterator[Problem]:
    needed = {"tensorwise": "9.14", "mxfp8": "9.21 (not 9.23.0 or 9.23.1)"}.get(job.recipe.name)
    if needed is not None and _in_attention(job) and not job.emulated:
        yield Problem(
            message=f"fp8_recipe.fp8_dpa=true with {job.recipe.name} needs cuDNN {needed}, which shows when "
            "the job starts.",
            key="fp8_recipe.fp8_dpa",
            value=True,
            fix="Look with NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=1 which backend attention takes.",
        )
