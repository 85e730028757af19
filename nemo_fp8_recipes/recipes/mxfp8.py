"""Blocks of 32 with E8M0 scales: `transformer_engine.common.recipe.MXFP8BlockScaling`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from nemo_fp8_recipes.recipes.base import QuantizedRecipe
from nemo_fp8_recipes.recipes.options import OPERANDS, OperandPlan, TensorName, option

__all__ = ["BLOCK", "Mxfp8"]

BLOCK = 32  # elements that share a scale


@dataclass(frozen=True, kw_only=True)
class Mxfp8(QuantizedRecipe):
    """Every 32 consecutive elements along a GEMM's inner dimension share a power-of-two scale, rounded up."""

    name: ClassVar[str] = "mxfp8"
    precision: ClassVar[Literal["bf16", "fp8", "fp4"]] = "fp8"
    te_class: ClassVar[str | None] = "MXFP8BlockScaling"
    since: ClassVar[str | None] = "2.0"

    margin: int = option(0, ignored="TE's MXFP8 takes a margin and no kernel reads it")
    enable_2d_quantization: bool = option(False, since="2.19")
    tp_only_amax_red: bool = option(
        False,
        te=False,
        megatron="tp_only_amax_red",
        ignored="MXFP8 takes the amax of 32 elements and reduces none over ranks",
    )

    def operands(self) -> dict[TensorName, OperandPlan]:
        return self._without_backward(
            {
                name: OperandPlan(
                    format=self.backward_format if name == "grad_output" else self.forward_format,
                    scaling="block",
                    block=(BLOCK, BLOCK) if name == "weight" and self.enable_2d_quantization else (1, BLOCK),
                    scale_dtype="e8m0",
                    power_of_two=True,
                )
                for name in OPERANDS
            }
        )
