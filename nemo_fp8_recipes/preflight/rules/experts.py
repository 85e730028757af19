"""Expert layers: are the tokens of an expert padded to what the recipe's GEMMs take?"""

from __future__ import annotations

from collections.abc import Iterator

from nemo_fp8_recipes.preflight.citation import core
from nemo_fp8_recipes.preflight.inputs import PreflightInput
from nemo_fp8_recipes.preflight.registry import Problem, rule
from nemo_fp8_recipes.targets.versions import at_least

_CONFIG = "transformer/transformer_config.py"
_KEY = "megatron.moe_router_padding_for_quantization"


@rule(
    "FP8-MOE-001",
    "error",
    "padding by the router with a dispatcher or a precision that has none",
    source=(
        core(_CONFIG, 1624, "fp8/fp4 must be specified when moe_router_padding_for_quantization"),
        core(_CONFIG, 1629, "allgather and alltoall_seq dispatcher does not support"),
    ),
    versions="megatron-core >= 0.13 (there moe_router_padding_for_fp8, up to 0.15)",
    of_gpu=False,
)
def router_padding(job: PreflightInput) -> Iterator[Problem]:
    if not job.megatron.moe_router_padding_for_quantization:
        return
    if job.recipe.precision == "bf16":
        yield Problem(
            message=f"{_KEY}=true pads for FP8 and FP4, and fp8_recipe=bf16.",
            key=_KEY,
            value=True,
            fix=f"Set {_KEY}=false.",
        )
    elif job.megatron.moe_token_dispatcher_type == "allgather":
        yield Problem(
            message=f"{_KEY}=true needs the alltoall or flex dispatcher.",
            key="megatron.moe_token_dispatcher_type",
            value="allgather",
            fix="Set megatron.moe_token_dispatcher_type=alltoall.",
        )


@rule(
    "FP8-MOE-002",
    "error",
    "experts need a newer Transformer Engine",
    source=core(_CONFIG, 1609, "Only transformer-engine>=1.11.0 supports FP8 grouped gemm"),
    versions="all",
    of_gpu=False,
)
def grouped_gemm(job: PreflightInput) -> Iterator[Problem]:
    if job.model is None or not job.model.has_experts or job.recipe.precision != "fp8":
        return
    needed = "1.11" if job.megatron.moe_grouped_gemm else "1.7"
    if job.te_version is not None and not at_least(job.te_version, needed):
        yield Problem(
            message=f"Experts in FP8 need Transformer Engine {needed}, and the job finds {job.te_version}.",
            key="versions.te",
            value=job.te_version,
            fix=f"Upgrade Transformer Engine to {needed} or later.",
        )


@rule(
    "FP8-MOE-003",
    "info",
    "the tokens of every expert are padded",
    source=(
        core("transformer/moe/experts.py", 605, "self.quantization_padding = Fp8Padding"),
        core("fp8_utils.py", 168, "def get_fp8_align_size"),
    ),
    versions="megatron-core >= 0.13",
    of_gpu=False,
)
def padding_cost(job: PreflightInput) -> Iterator[Problem]:
    model = job.model
    if model is None or not model.has_experts or job.recipe.precision == "bf16":
        return
    average = model.tokens_an_expert(job.parallel)
    multiple = 32 if job.recipe.name in ("mxfp8", "nvfp4") else 16
    if average < 8 * multiple:
        yield Problem(
            message=f"An expert gets about {average} tokens of a micro-batch, and each is padded to a "
            f"multiple of {multiple}: about {multiple / 2 / max(average, 1):.0%} of the rows are padding.",
            key="training.micro_batch_size",
            value=model.micro_batch_size,
            fix="More tokens a micro-batch, or more parallel.ep, give an expert more of them.",
        )
