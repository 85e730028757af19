"""FP4 blocks of 16 under a per-tensor scale: `transformer_engine.common.recipe.NVFP4BlockScaling`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from nemo_fp8_recipes.recipes.base import QuantizedRecipe
from nemo_fp8_recipes.recipes.options import OPERANDS, OperandPlan, TensorName, option

__all__ = ["BLOCK", "Nvfp4", "Scope"]

BLOCK = 16  # elements that share an E4M3 scale
Scope = Literal["none", "weights", "activations", "all"]


@dataclass(frozen=True, kw_only=True)
class Nvfp4(QuantizedRecipe):
    """E2M1 elements, an E4M3 scale for every 16, an FP32 scale for the tensor.

    By default with random Hadamard transforms of inputs and gradients for the weight gradient, stochastic
    rounding of gradients and 16x16 blocks for weights. `fp8_format` is the format of the block scales.
    """

    name: ClassVar[str] = "nvfp4"
    precision: ClassVar[Literal["bf16", "fp8", "fp4"]] = "fp4"
    te_class: ClassVar[str | None] = "NVFP4BlockScaling"
    since: ClassVar[str | None] = "2.8"

    fp8_format: Literal["e4m3"] = option("e4m3")
    fp4_format: Literal["e2m1"] = option("e2m1")
    disable_rht: bool = option(False)
    disable_stochastic_rounding: bool = option(False)
    disable_2d_quantization: bool = option(False)
    row_scaled_activation: bool = option(False, since="2.16")
    nvfp4_4over6: Scope = option("none", since="2.17")
    nvfp4_4over6_e4m3_use_256: Scope = option("all", since="2.17")
    nvfp4_4over6_err_mode: Literal["MAE", "MSE"] = option("MAE", since="2.17")
    fp8_param: bool = option(False, te=False, megatron="fp4_param")
    tp_only_amax_red: bool = option(
        False,
        te=False,
        megatron="tp_only_amax_red",
        ignored="NVFP4 takes the amax of the tensor at hand, not over Megatron's amax group",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nvfp4_4over6 in ("activations", "all") and not self.disable_rht:
            raise self.refuse(
                "nvfp4_4over6",
                "is not possible with random Hadamard transforms: TE has no kernel for both",
                hint="Set fp8_recipe.disable_rht=true, or nvfp4_4over6=weights.",
            )
        if self.row_scaled_activation and not self.disable_rht:
            raise self.refuse(
                "row_scaled_activation",
                "is not possible with random Hadamard transforms: TE has no kernel for both",
                hint="Set fp8_recipe.disable_rht=true too.",
            )
        if self.nvfp4_4over6 == "none":
            for key, default in (("nvfp4_4over6_e4m3_use_256", "all"), ("nvfp4_4over6_err_mode", "MAE")):
                if getattr(self, key) != default:
                    raise self.refuse(key, "would change nothing while nvfp4_4over6=none", allowed=[default])

    def operands(self) -> dict[TensorName, OperandPlan]:
        return self._without_backward(
            {
                name: OperandPlan(
                    format="e2m1",
                    scaling="block",
                    block=(BLOCK, BLOCK)
                    if name == "weight" and not self.disable_2d_quantization
                    else (1, BLOCK),
                    scale_dtype="e4m3",
                    power_of_two=False,
                )
                for name in OPERANDS
            }
        )
