"""Environment variables that Transformer Engine reads, when it is imported, as defaults of recipe options.

Source: transformer_engine/common/recipe/__init__.py. Where TE's own code or Megatron's builds the recipe
object from its format alone, they are the only way to these options.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from nemo_fp8_recipes.recipes.base import Recipe

__all__ = ["VARIABLES", "TeVariable", "environment"]


@dataclass(frozen=True)
class TeVariable:
    """One variable.

    Attributes:
        option: the recipe option that it is the default of.
        recipes: the recipes that have it.
        flag: TE reads "1" as true and all else as false; otherwise the text is the value.
    """

    option: str
    recipes: tuple[str, ...]
    flag: bool = True

    def text(self, value: object) -> str | None:
        """What to set it to for this value of the option; None: unset it."""
        if self.flag:
            return "1" if value else "0"
        return None if value is None else str(value)


VARIABLES: Mapping[str, TeVariable] = MappingProxyType(
    {
        "NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES": TeVariable("use_power_2_scales", ("tensorwise",)),
        "NVTE_FP8_BLOCK_SCALING_FP32_SCALES": TeVariable("use_f32_scales", ("blockwise",)),
        "NVTE_NVFP4_DISABLE_RHT": TeVariable("disable_rht", ("nvfp4",)),
        "NVTE_NVFP4_DISABLE_STOCHASTIC_ROUNDING": TeVariable("disable_stochastic_rounding", ("nvfp4",)),
        "NVTE_NVFP4_DISABLE_2D_QUANTIZATION": TeVariable("disable_2d_quantization", ("nvfp4",)),
        "NVTE_NVFP4_ROW_SCALED_ACTIVATION": TeVariable("row_scaled_activation", ("nvfp4",)),
        "NVTE_NVFP4_4OVER6": TeVariable("nvfp4_4over6", ("nvfp4",), flag=False),
        "NVTE_NVFP4_4OVER6_E4M3_USE_256": TeVariable("nvfp4_4over6_e4m3_use_256", ("nvfp4",), flag=False),
        "NVTE_NVFP4_4OVER6_ERR_MODE": TeVariable("nvfp4_4over6_err_mode", ("nvfp4",), flag=False),
        "NVTE_BACKWARD_OVERRIDE": TeVariable(
            "backward_override", ("delayed", "tensorwise", "mxfp8", "blockwise", "nvfp4"), flag=False
        ),
    }
)


def environment(recipe: Recipe) -> dict[str, str | None]:
    """Every variable that TE reads for this recipe, set so that TE's defaults say what the recipe says.

    None means that the variable must not be set: what a shell inherited would decide otherwise.
    """
    return {
        name: variable.text(getattr(recipe, variable.option))
        for name, variable in VARIABLES.items()
        if recipe.name in variable.recipes
    }
