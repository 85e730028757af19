"""Do environment variables that TE reads say something else than the recipe?"""

from __future__ import annotations

from collections.abc import Iterator

from nemo_fp8_recipes.preflight.citation import engine
from nemo_fp8_recipes.preflight.inputs import PreflightInput
from nemo_fp8_recipes.preflight.registry import Problem, rule
from nemo_fp8_recipes.targets import te_environment


@rule(
    "FP8-ENV-001",
    "warning",
    "an environment variable disagrees with the recipe",
    source=(
        engine("common/recipe/__init__.py", 429, "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"),
        engine("common/recipe/__init__.py", 302, "NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES"),
        engine("common/recipe/__init__.py", 261, "NVTE_BACKWARD_OVERRIDE"),
        engine("common/recipe/__init__.py", 558, "NVTE_NVFP4_DISABLE_RHT"),
    ),
    versions="transformer-engine >= 2.2",
    of_gpu=False,
)
def defaults_disagree(job: PreflightInput) -> Iterator[Problem]:
    for name, variable in te_environment.VARIABLES.items():
        text = job.environment.get(name)
        if text is None or job.recipe.name not in variable.recipes:
            continue
        wanted: object = (text == "1") if variable.flag else text
        value = getattr(job.recipe, variable.option)
        if str(wanted).lower() != str(value).lower():
            shown = "null" if value is None else str(value).lower()
            yield Problem(
                message=f"{name}={text} is set; the recipe says {variable.option}={shown}, and is used.",
                key=f"fp8_recipe.{variable.option}",
                value=value,
                fix=f"Unset {name}, or set fp8_recipe.{variable.option}.",
            )


@rule(
    "FP8-ENV-002",
    "warning",
    "an environment variable changes the recipe inside attention",
    source=engine("pytorch/attention/dot_product_attention/utils.py", 584, 'if _dpa_fp8_recipe != ""'),
    versions="transformer-engine >= 2.8",
    of_gpu=False,
)
def attention_overridden(job: PreflightInput) -> Iterator[Problem]:
    text = job.environment.get("NVTE_DPA_FP8_RECIPE")
    if text and getattr(job.recipe, "fp8_dpa", False):
        effect = "switches FP8 attention off" if text == "F16" else f"runs attention with {text}"
        yield Problem(
            message=f"NVTE_DPA_FP8_RECIPE={text} {effect}, whatever the recipe says.",
            key="fp8_recipe.fp8_dpa",
            value=True,
            fix="Unset NVTE_DPA_FP8_RECIPE, unless you want that.",
        )


@rule(
    "FP8-ENV-003",
    "warning",
    "NVTE_UNFUSED_FP8_UPDATE changes delayed scaling",
    source=engine("pytorch/quantization.py", 688, "NVTE_UNFUSED_FP8_UPDATE"),
    of_gpu=False,
)
def unfused_update(job: PreflightInput) -> Iterator[Problem]:
    text = job.environment.get("NVTE_UNFUSED_FP8_UPDATE", "0")
    if job.recipe.name == "delayed" and text != "0":
        yield Problem(
            message=f"NVTE_UNFUSED_FP8_UPDATE={text} updates scales in Python, which is slower and gives "
            "other scales for an amax of zero or NaN.",
            key="fp8_recipe",
            value="delayed",
            fix="Unset NVTE_UNFUSED_FP8_UPDATE.",
        )
