"""Quantised primary weights (`fp8_param`, FP8 parameter gather): are they updated?"""

from __future__ import annotations

from collections.abc import Iterator

from nemo_fp8_recipes.preflight.citation import core, megatron_lm
from nemo_fp8_recipes.preflight.inputs import PreflightInput
from nemo_fp8_recipes.preflight.registry import Problem, rule

_REUSE = "megatron.reuse_grad_buf_for_mxfp8_param_ag"


def _kept_quantised(job: PreflightInput) -> bool:
    return bool(getattr(job.recipe, "fp8_param", False))


@rule(
    "FP8-GTH-001",
    "warning",
    "FP8 parameter gather without the distributed optimizer",
    source=megatron_lm("megatron/training/arguments.py", 656, "assert args.use_distributed_optimizer"),
    versions="Megatron-LM and Megatron-Bridge refuse it; Megatron-Core by itself does not",
    of_gpu=False,
)
def gather_without_distributed_optimizer(job: PreflightInput) -> Iterator[Problem]:
    if _kept_quantised(job) and job.distributed_optimizer is False:
        yield Problem(
            message="fp8_recipe.fp8_param=true without the distributed optimizer: Megatron-LM refuses "
            "--fp8-param-gather then, because nothing is gathered.",
            key="optimizer.distributed_optimizer",
            value=False,
            fix="Set optimizer.distributed_optimizer=true, or fp8_recipe.fp8_param=false.",
        )


@rule(
    "FP8-GTH-002",
    "error",
    "the gradient buffer reused for weights that are not MXFP8",
    source=core(
        "distributed/distributed_data_parallel_config.py", 154, "Reuse grad buffer only when keeping params"
    ),
    versions="megatron-core >= 0.14",
    of_gpu=False,
)
def reuse_needs_mxfp8_weights(job: PreflightInput) -> Iterator[Problem]:
    if not job.megatron.reuse_grad_buf_for_mxfp8_param_ag:
        return
    if not _kept_quantised(job):
        yield Problem(
            message="megatron.reuse_grad_buf_for_mxfp8_param_ag=true gathers MXFP8 weights, and "
            "fp8_recipe.fp8_param=false keeps them in BF16.",
            key=_REUSE,
            value=True,
            fix="Set fp8_recipe.fp8_param=true, or megatron.reuse_grad_buf_for_mxfp8_param_ag=false.",
        )
    elif job.recipe.name != "mxfp8":
        yield Problem(
            message=f"megatron.reuse_grad_buf_for_mxfp8_param_ag=true is for MXFP8 weights, and "
            f"fp8_recipe={job.recipe.name}.",
            key=_REUSE,
            value=True,
            fix="Set megatron.reuse_grad_buf_for_mxfp8_param_ag=false.",
        )


@rule(
    "FP8-GTH-003",
    "error",
    "MXFP8 weights that are never updated",
    source=(
        "Megatron-LM issue 2063",
        core("optimizer/optimizer_config.py", 369, "mxfp8 without using reuse_grad_buf_for_mxfp8_param_ag"),
        core("optimizer/distrib_optimizer.py", 2485, "param buffer is not mapped to model params for MXFP8"),
    ),
    versions="megatron-core >= 0.14",
    of_gpu=False,
)
def mxfp8_weights_updated(job: PreflightInput) -> Iterator[Problem]:
    if (
        job.recipe.name == "mxfp8"
        and job.distributed_optimizer is not None  # else nothing is known about the optimizer
        and _kept_quantised(job)
        and not job.megatron.reuse_grad_buf_for_mxfp8_param_ag
    ):
        yield Problem(
            message="fp8_recipe.fp8_param=true with mxfp8: the distributed optimizer writes MXFP8 weights "
            "through the gradient buffer only; without it they keep their first values, and two copies of "
            "them take more memory than BF16.",
            key=_REUSE,
            value=False,
            fix="Set megatron.reuse_grad_buf_for_mxfp8_param_ag=true with "
            "optimizer.distributed_optimizer=true, or fp8_recipe.fp8_param=false.",
        )
