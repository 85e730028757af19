"""Do environment variables that TE reads say something else than the recipe?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nemo_fp8_recipes.preflight.inputs import PreflightInput
from nemo_fp8_recipes.preflight.registry import Problem, rule


@dataclass(frozen=True)
class _Variable:
    """An environment variable that is the default of a recipe option in TE."""

    option: str
    recipes: tuple[str, ...]
    flag: bool = True
    """TE reads "1" as true and all else as false."""


_DEFAULTS = {
    "NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES": _Variable("use_power_2_scales", ("tensorwise",)),
    "NVTE_FP8_BLOCK_SCALING_FP32_SCALES": _Variable("use_f32_scales", ("blockwise",)),
    "NVTE_NVFP4_DISABLE_RHT": _Variable("disable_rht", ("nvfp4",)),
    "NVTE_NVFP4_DISABLE_STOCHASTIC_ROUNDING": _Variable("disable_stochastic_rounding", ("nvfp4",)),
    "NVTE_NVFP4_DISABLE_2D_QUANTIZATION": _Variable("disable_2d_quantization", ("nvfp4",)),
    "NVTE_NVFP4_ROW_SCALED_ACTIVATION": _Variable("row_scaled_activation", ("nvfp4",)),
    "NVTE_NVFP4_4OVER6": _Variable("nvfp4_4over6", ("nvfp4",), flag=False),
    "NVTE_NVFP4_4OVER6_E4M3_USE_256": _Variable("nvfp4_4over6_e4m3_use_256", ("nvfp4",), flag=False),
    "NVTE_NVFP4_4OVER6_ERR_MODE": _Variable("nvfp4_4over6_err_mode", ("nvfp4",), flag=False),
    "NVTE_BACKWARD_OVERRIDE": _Variable(
        "backward_override", ("delayed", "tensorwise", "mxfp8", "blockwise", "nvfp4"), flag=False
    ),
}


@rule(
    "FP8-ENV-001",
    "warning",
    "an environment variable disagrees with the recipe",
    source="transformer_engine/common/recipe/__init__.py",
    versions="transformer-engine >= 2.2",
)
def defaults_disagree(job: PreflightInput) -> Iterator[Problem]:
    for name, variable in _DEFAULTS.items():
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
    source="transformer_engine/pytorch/attention/dot_product_attention/dot_product_attention.py",
    versions="transformer-engine >= 2.8",
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
    source="transformer_engine/pytorch/quantization.py: reduce_and_update_fp8_tensors",
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
