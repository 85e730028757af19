"""Does the recipe run on this GPU, or on its emulation?"""

from __future__ import annotations

from collections.abc import Iterator

from nemo_fp8_recipes.preflight.citation import Citation, engine, engine_cpp
from nemo_fp8_recipes.preflight.cost import cost
from nemo_fp8_recipes.preflight.hardware import (
    BLACKWELL,
    CAPABILITIES,
    any_gemm_layout,
    recipes_for,
    runs_on,
    spelled,
)
from nemo_fp8_recipes.preflight.inputs import PreflightInput
from nemo_fp8_recipes.preflight.registry import Problem, rule
from nemo_fp8_recipes.recipes import OPERANDS, Blockwise
from nemo_fp8_recipes.targets.versions import at_least, parse

# Transformer Engine releases that emulation/binding/releases.py knows.
EMULATED_ENGINES = ("2.11", "2.14", "2.17", "2.20")

_QUANTIZATION = "pytorch/quantization.py"
_SUPPORT = engine(_QUANTIZATION, 224, "def check_recipe_support")
BLOCKWISE_ON_BLACKWELL = "2.9"


@rule(
    "FP8-HW-001",
    "error",
    "the GPU cannot run the recipe",
    source=(
        _SUPPORT,
        engine(_QUANTIZATION, 149, "def _compute_fp8_support"),
        engine(_QUANTIZATION, 162, "def _compute_mxfp8_support"),
        engine(_QUANTIZATION, 171, "def _compute_nvfp4_support"),
        engine(_QUANTIZATION, 178, "def _compute_fp8_block_scaling_support"),
    ),
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
    source=_SUPPORT,
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
    source=engine_cpp("common/transpose/quantize_transpose_vector_blockwise.cu", 535, "power of two scaling"),
    versions="transformer-engine >= 2.9",
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
    "the recipe needs a newer CUDA",
    source=(
        engine(_QUANTIZATION, 184, "FP8 block scaled GEMM requires"),
        engine(_QUANTIZATION, 158, "Cuda version 12.1 or higher required for FP8 execution on Ada."),
        engine_cpp("common/gemm/cublaslt_gemm.cu", 502, "cublas_version() >= 120800"),
    ),
    versions="transformer-engine >= 2.0",
)
def cuda_for_recipe(job: PreflightInput) -> Iterator[Problem]:
    if job.emulated or job.cuda_version is None:
        return
    ada = job.hardware.capability == (8, 9)
    needed = {"blockwise": (12, 9), "mxfp8": (12, 8), "nvfp4": (12, 8)}.get(
        job.recipe.name, (12, 1) if ada and job.recipe.precision == "fp8" else None
    )
    if needed is not None and job.cuda_version < needed:
        yield Problem(
            message=f"fp8_recipe={job.recipe.name} needs CUDA {spelled(needed)}"
            f"{' on Ada' if job.recipe.name in ('delayed', 'tensorwise') else ''}, and torch is built with "
            f"CUDA {spelled(job.cuda_version)}.",
            key="fp8_recipe",
            value=job.recipe.name,
            fix=f"Use a build of torch for CUDA {spelled(needed)} or later.",
        )


@rule(
    "FP8-HW-005",
    "error",
    "block scaling on Blackwell needs a newer Transformer Engine",
    source=Citation(
        "TransformerEngine",
        "v2.8",
        "transformer_engine/pytorch/fp8.py",
        68,
        "get_device_compute_capability() < (10, 0)",
    ),
    versions="transformer-engine 2.3 to 2.8",
)
def blockwise_on_blackwell(job: PreflightInput) -> Iterator[Problem]:
    capability = job.hardware.capability
    if job.recipe.name != "blockwise" or capability is None or capability < BLACKWELL:
        return
    if job.te_version is not None and not at_least(job.te_version, BLOCKWISE_ON_BLACKWELL):
        yield Problem(
            message=f"Before {BLOCKWISE_ON_BLACKWELL} Transformer Engine runs block scaling on Hopper only, "
            f"and the job finds {job.te_version} on {job.hardware.display_name}.",
            key="versions.te",
            value=job.te_version,
            fix=f"Upgrade Transformer Engine to {BLOCKWISE_ON_BLACKWELL} or later, or use fp8_recipe=mxfp8.",
        )


@rule(
    "FP8-HW-006",
    "warning",
    "the model's weights do not fit",
    source="Bytes of the linear layers' weights: docs/doctor.md",
)
def fits(job: PreflightInput) -> Iterator[Problem]:
    memory = job.hardware.memory_gb
    if memory is None or job.model is None:
        return
    capability = job.hardware.capability
    # Of the capability only this matters to the cost; a few values of it are cached.
    layout = BLACKWELL if capability is not None and any_gemm_layout(capability) else None
    held = cost(job.recipe, layout, job.model, job.parallel, job.modules).weights
    if held > memory * 1e9:
        yield Problem(
            message=f"The linear layers' weights alone take {held / 1e9:.0f} GB on each rank, and "
            f"{job.hardware.display_name} has {memory} GB.",
            key="parallel.tp",
            value=job.parallel.tp,
            fix="Cut the model over more ranks: parallel.tp, parallel.pp, parallel.ep.",
        )


@rule("FP8-EMU-003", "error", "a setting of Megatron is not emulated", source="nemo_fp8_recipes/emulation")
def settings_emulated(job: PreflightInput) -> Iterator[Problem]:
    if not job.emulated:
        return
    off = {"cuda_graph_impl": "none", "fine_grained_activation_offloading": False, "tp_comm_overlap": False}
    for key, value in off.items():
        found = getattr(job.megatron, key)
        if found != value:
            yield Problem(
                message=f"megatron.{key}={str(found).lower()} needs a GPU: it is not emulated.",
                key=f"megatron.{key}",
                value=found,
                fix=f"Set megatron.{key}={str(value).lower()}, or run on a GPU.",
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


@rule(
    "FP8-EMU-004",
    "error",
    "a Transformer Engine whose compiled module is not emulated",
    source="nemo_fp8_recipes/emulation/binding/releases.py",
    of_gpu=False,
)
def engine_emulated(job: PreflightInput) -> Iterator[Problem]:
    version = job.te_version
    if not job.emulated or version is None:
        return
    if ".".join(str(part) for part in parse(version)[:2]) not in EMULATED_ENGINES:
        *most, last = EMULATED_ENGINES
        yield Problem(
            message=f"Transformer Engine {version} is not emulated: tested are {', '.join(most)} and {last}.",
            key="versions.te",
            value=version,
            fix=f'Install one of them, such as: pip install "transformer-engine=={last}.*"',
        )
