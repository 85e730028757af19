"""What Megatron's configuration says about itself, where a framework has changed it since."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_fp8_recipes.preflight.citation import core
from nemo_fp8_recipes.preflight.inputs import PreflightInput
from nemo_fp8_recipes.preflight.registry import Problem, rule


@rule(
    "FP8-CFG-001",
    "error",
    "Megatron's own check refuses its configuration",
    source=(
        core("transformer/transformer_config.py", 909, "def __post_init__(self):"),
        "nemo_toolkit 2.7.3, nemo/lightning/pytorch/plugins/mixed_precision.py: fields set after the check",
    ),
    of_gpu=False,
)
def refused_by_itself(job: PreflightInput) -> Iterator[Problem]:
    if job.megatron_refusal is not None:
        yield Problem(
            message=f"Megatron refuses this configuration, which has changed since it was made: "
            f"{job.megatron_refusal.rstrip('.')}.",
            key="megatron",
            fix="Put right the fields that it names.",
        )
