"""Tensor-parallel communication overlap: are its buffers there for every GEMM?"""

from __future__ import annotations

from collections.abc import Iterator

from nemo_fp8_recipes.preflight.citation import engine, megatron_lm
from nemo_fp8_recipes.preflight.inputs import PreflightInput
from nemo_fp8_recipes.preflight.registry import Problem, rule
from nemo_fp8_recipes.recipes import QuantizedRecipe
from nemo_fp8_recipes.targets.versions import at_least

_KEY = "megatron.tp_comm_overlap"
_UNREGISTERED = engine("pytorch/module/base.py", 584, "is not registered.")
MODES_SINCE = {"te": "2.8", "megatron_core": "0.15"}


@rule(
    "FP8-OVL-001",
    "error",
    "communication overlap without sequence parallelism",
    source=megatron_lm("megatron/training/arguments.py", 916, "assert args.sequence_parallel == True"),
    versions="all",
    of_gpu=False,
)
def overlap_needs_sequence(job: PreflightInput) -> Iterator[Problem]:
    if job.megatron.tp_comm_overlap and not job.parallel.sequence:
        yield Problem(
            message="megatron.tp_comm_overlap=true overlaps the communication of sequence parallelism, and "
            "parallel.sequence=false.",
            key=_KEY,
            value=True,
            fix="Set parallel.sequence=true (with parallel.tp > 1), or megatron.tp_comm_overlap=false.",
        )


@rule(
    "FP8-OVL-002",
    "error",
    "communication overlap has buffers for one precision only",
    source=(
        "Megatron-LM issue 1703",
        _UNREGISTERED,
        megatron_lm("megatron/training/initialize.py", 281, "quantization_modes.append"),
    ),
    versions="transformer-engine < 2.8, or megatron-core < 0.15, or NeMo 2",
    of_gpu=False,
)
def overlap_and_bf16_layers(job: PreflightInput) -> Iterator[Problem]:
    if not job.megatron.tp_comm_overlap or not isinstance(job.recipe, QuantizedRecipe):
        return
    if not job.recipe.layers_in_bf16 and not job.scheduled:
        return
    old = [
        f"{name} {version}"
        for name, version, since in (
            ("Transformer Engine", job.te_version, MODES_SINCE["te"]),
            ("Megatron-Core", job.megatron_core_version, MODES_SINCE["megatron_core"]),
        )
        if version is not None and not at_least(version, since)
    ]
    if job.nemo_version is not None and not at_least(job.nemo_version, "3"):
        old.append(f"NeMo {job.nemo_version}")  # its callback passes use_fp8, one mode
    cause = "BF16 layers at the ends" if job.recipe.layers_in_bf16 else "A schedule with a phase in BF16"
    if old:
        yield Problem(
            message=f"{cause} need buffers of their own, and {' and '.join(old)} registers one kind: "
            "TE raises a KeyError at the first GEMM of the other.",
            key=_KEY,
            value=True,
            fix="Set megatron.tp_comm_overlap=false, quantise every layer, or use Transformer Engine "
            f"{MODES_SINCE['te']} with Megatron-Core {MODES_SINCE['megatron_core']} or later.",
        )
    elif job.scheduled and not job.recipe.layers_in_bf16:
        yield Problem(
            message=f"{cause} needs buffers of its own, and Megatron registers them for BF16 layers at the "
            "ends only.",
            key=_KEY,
            value=True,
            fix="Register quantization_modes=[FP8, NONE] in te.initialize_ub, or set "
            "megatron.tp_comm_overlap=false.",
            severity="warning",
        )
