"""Do the installed versions know the recipe and its options?"""

from __future__ import annotations

from collections.abc import Iterator

from nemo_fp8_recipes.preflight.inputs import PreflightInput
from nemo_fp8_recipes.preflight.registry import Problem, rule
from nemo_fp8_recipes.targets.transformer_engine import newer_options


@rule(
    "FP8-VER-001",
    "error",
    "Transformer Engine is older than an option",
    source="transformer_engine/common/recipe/__init__.py",
)
def options_exist(job: PreflightInput) -> Iterator[Problem]:
    if job.te_version is None:
        return
    for name, since in newer_options(job.recipe, job.te_version):
        key = "fp8_recipe" if name == "name" else f"fp8_recipe.{name}"
        value = job.recipe.name if name == "name" else getattr(job.recipe, name)
        yield Problem(
            message=f"{key}={value} needs Transformer Engine {since}, and {job.te_version} is installed.",
            key=key,
            value=value,
            fix=f"Upgrade Transformer Engine to {since} or later.",
        )


@rule("FP8-VER-002", "error", "Transformer Engine is not installed", source="nemo_fp8_recipes/training")
def engine_installed(job: PreflightInput) -> Iterator[Problem]:
    if job.te_version is None:
        yield Problem(
            message="Transformer Engine is not installed here: the recipe's options are not checked.",
            fix="pip install 'nemo-fp8-recipes[cpu]', or work in a container that has it.",
            severity="error" if job.runs_here else "warning",
        )
