"""Does the recipe run on this GPU, or on its emulation?"""

from __future__ import annotations

from collections.abc import Iterator

from nemo_fp8_recipes.preflight.hardware import BLACKWELL, CAPABILITIES, recipes_for, runs_on, spelled
from nemo_fp8_recipes.preflight.inputs import PreflightInput
from nemo_fp8_recipes.preflight.registry import Problem, rule
from nemo_fp8_recipes.recipes import OPERANDS, Blockwise

# Options of a recipe that emulation/ has no kernels for, with the value that it has them for.
NOT_EMULATED = {"nvfp4": {"nvfp4_4over6": "none"}}

_QUANTIZATION = "transformer_engine/pytorch/quantization.py"


@rule(
    "FP8-HW-001",
    "error",
    "the GPU cannot run the recipe",
    source=f"{_QUANTIZATION}: check_recipe_support",
    versions="transformer-engine >= 2.0",
)
def recipe_on_device(job: PreflightInput) -> Iterator[Problem]:
    capability = job.hardware.capability
    if capability is None or runs_on(job.recipe.name, capability):
        return
    others = recipes_for(capability)
    needed = CAPABILITIES[job.recipe.name]
    yield Problem(
        message=f"fp8_recipe={job.recipe.name} needs a GPU of compute capability {needed}, and "
        f"{job.hardware.display_name} has {spelled(capability)}.",
        key="hardware",
        value=job.hardware.name,
        fix=f"Recipes that run on {job.hardware.display_name}: {', '.join(others)}."
        if others
        else f"No recipe runs on {job.hardware.display_name}.",
    )


@rule(
    "FP8-HW-002",
    "info",
    "the GPU is not known yet",
    source=f"{_QUANTIZATION}: check_recipe_support",
)
def device_unknown(job: PreflightInput) -> Iterator[Problem]:
    if job.hardware.capability is None and job.recipe.precision != "bf16":
        yield Problem(
            message=f"Whether the GPU runs fp8_recipe={job.recipe.name} shows when the job starts.",
            key="hardware",
            value=job.hardware.name,
            fix="Name the GPU to know it now, such as hardware=h100.",
        )


@rule(
    "FP8-HW-003",
    "error",
    "FP32 block scales do not run on Blackwell",
    source="transformer_engine/common/transpose/quantize_transpose_vector_blockwise.cu",
    versions="transformer-engine >= 2.3",
)
def fp32_block_scales(job: PreflightInput) -> Iterator[Problem]:
    capability = job.hardware.capability
    if not isinstance(job.recipe, Blockwise) or capability is None or capability < BLACKWELL:
        return
    quantization = job.recipe.quantization()
    exact = [name for name in OPERANDS if not quantization[name].power_2_scale]
    if exact:
        own = not job.recipe.use_f32_scales
        yield Problem(
            message=f"On {job.hardware.display_name} TE runs block scaling through MXFP8, whose scales are "
            f"powers of two, and the scales of {', '.join(exact)} are not.",
            key="fp8_recipe.fp8_quant_*.power_2_scale" if own else "fp8_recipe.use_f32_scales",
            value=not own,
            fix="Set power_2_scale=null for these operands."
            if own
            else "Set fp8_recipe.use_f32_scales=false, or run on Hopper.",
        )


@rule(
    "FP8-HW-004",
    "error",
    "block scaling needs CUDA 12.9",
    source=f"{_QUANTIZATION}: _compute_fp8_block_scaling_support",
    versions="transformer-engine >= 2.3",
)
def cuda_for_blockwise(job: PreflightInput) -> Iterator[Problem]:
    if job.emulated or job.recipe.name != "blockwise" or job.cuda_version is None:
        return
    if job.cuda_version < (12, 9):
        yield Problem(
            message="fp8_recipe=blockwise needs CUDA 12.9, and torch is built with CUDA "
            f"{spelled(job.cuda_version)}.",
            key="fp8_recipe",
            value="blockwise",
            fix="Use a build of torch for CUDA 12.9 or later.",
        )


@rule("FP8-EMU-001", "error", "an option of the recipe is not emulated", source="nemo_fp8_recipes/emulation")
def recipe_emulated(job: PreflightInput) -> Iterator[Problem]:
    if not job.emulated:
        return
    for option, emulated in NOT_EMULATED.get(job.recipe.name, {}).items():
        value = getattr(job.recipe, option)
        if value != emulated:
            yield Problem(
                message=f"fp8_recipe.{option}={value} is not emulated: it can be configured, and runs on a "
                "GPU.",
                key=f"fp8_recipe.{option}",
                value=value,
                fix=f"Set fp8_recipe.{option}={emulated}, or run on a GPU.",
            )


@rule("FP8-EMU-002", "error", "FP8 attention is not emulated", source="nemo_fp8_recipes/emulation")
def attention_emulated(job: PreflightInput) -> Iterator[Problem]:
    if job.emulated and getattr(job.recipe, "fp8_dpa", False):
        yield Problem(
            message="fp8_recipe.fp8_dpa=true needs TE's fused attention, which is not emulated.",
            key="fp8_recipe.fp8_dpa",
            value=True,
            fix="Set fp8_recipe.fp8_dpa=false, or run on a GPU.",
        )
