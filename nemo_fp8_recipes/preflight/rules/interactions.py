"""Settings that are fine alone and break together."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_fp8_recipes.preflight.citation import engine
from nemo_fp8_recipes.preflight.inputs import PreflightInput
from nemo_fp8_recipes.preflight.registry import Problem, rule
from nemo_fp8_recipes.recipes import Delayed


@rule(
    "FP8-MIX-002",
    "info",
    "a function of your own updates the scales",
    source=engine("pytorch/quantization.py", 1153, "def _amax_and_scale_update"),
    of_gpu=False,
)
def own_scale_update(job: PreflightInput) -> Iterator[Problem]:
    recipe = job.recipe
    if not isinstance(recipe, Delayed):
        return
    for key in ("amax_compute_algo", "scaling_factor_compute_algo"):
        value = getattr(recipe, key)
        if value and ":" in value:
            yield Problem(
                message=f"fp8_recipe.{key}={value} replaces TE's fused scale update by an unfused one: "
                "slower, and other results for an amax of zero or NaN.",
                key=f"fp8_recipe.{key}",
                value=value,
            )
