"""Settings that run and are known to train badly."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_fp8_recipes.preflight.citation import engine_cpp
from nemo_fp8_recipes.preflight.inputs import PreflightInput
from nemo_fp8_recipes.preflight.registry import Problem, rule
from nemo_fp8_recipes.recipes import Blockwise, Delayed, Mxfp8


@rule(
    "FP8-NUM-001",
    "warning",
    "MXFP8 with E5M2 gradients diverged",
    source="Megatron-Bridge discussion 638, NeMo issue 14793, arXiv 2506.08027",
    of_gpu=False,
)
def hybrid_mxfp8(job: PreflightInput) -> Iterator[Problem]:
    if isinstance(job.recipe, Mxfp8) and job.recipe.fp8_format == "hybrid":
        yield Problem(
            message="MXFP8 with E5M2 gradients diverged on Nemotron, and cost accuracy in NVIDIA's study.",
            key="fp8_recipe.fp8_format",
            value="hybrid",
            fix="Set fp8_recipe.fp8_format=e4m3.",
        )


@rule(
    "FP8-NUM-002",
    "warning",
    "128x128 blocks for gradients diverged",
    source="DeepSeek-V3, arXiv 2412.19437",
    of_gpu=False,
)
def two_dimensional_gradients(job: PreflightInput) -> Iterator[Problem]:
    if isinstance(job.recipe, Blockwise) and job.recipe.grad_block_scaling_dim == 2:
        yield Problem(
            message="Gradients in 128x128 blocks diverged in DeepSeek-V3's ablation: outlier tokens take the "
            "precision of the tokens beside them.",
            key="fp8_recipe.grad_block_scaling_dim",
            value=2,
            fix="Set fp8_recipe.grad_block_scaling_dim=1.",
        )


@rule(
    "FP8-NUM-003",
    "warning",
    "a short amax history",
    source=engine_cpp("common/recipe/delayed_scaling.cu", 114, "switch (amax_compute_algo)"),
    of_gpu=False,
)
def short_history(job: PreflightInput) -> Iterator[Problem]:
    recipe = job.recipe
    if isinstance(recipe, Delayed) and (
        recipe.amax_history_len == 1 or recipe.amax_compute_algo == "most_recent"
    ):
        key = "amax_history_len" if recipe.amax_history_len == 1 else "amax_compute_algo"
        yield Problem(
            message="The scale follows the last step's amax alone: a larger next one is clipped.",
            key=f"fp8_recipe.{key}",
            value=getattr(recipe, key),
            fix="Use fp8_recipe.amax_compute_algo=max with a history of 16 to 1024.",
        )
