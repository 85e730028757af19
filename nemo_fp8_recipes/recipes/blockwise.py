"""Blocks of 128 with FP32 scales: `transformer_engine.common.recipe.Float8BlockScaling`."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar, Literal

from nemo_fp8_recipes.recipes.base import QuantizedRecipe
from nemo_fp8_recipes.recipes.options import OPERANDS, MMParams, OperandPlan, QParams, TensorName, option

__all__ = ["BLOCK", "Blockwise"]

BLOCK = 128  # elements that share a scale, along one dimension (1D) or both (2D)


@dataclass(frozen=True, kw_only=True)
class Blockwise(QuantizedRecipe):
    """1x128 blocks (1D) or 128x128 blocks (2D) share a scale, FP8 max / amax, rounded down to a power of two.

    `use_f32_scales` keeps the scales as they are; TE's own constructor takes it and drops it, and
    `targets.transformer_engine` puts it into effect. `amax_epsilon` holds for every operand that
    `fp8_quant_*` says nothing about.
    """

    name: ClassVar[str] = "blockwise"
    precision: ClassVar[Literal["bf16", "fp8", "fp4"]] = "fp8"
    te_class: ClassVar[str | None] = "Float8BlockScaling"
    since: ClassVar[str | None] = "2.3"

    use_f32_scales: bool = option(False)
    amax_epsilon: float = option(0.0, te=False)
    x_block_scaling_dim: int = option(1)
    w_block_scaling_dim: int = option(2)
    grad_block_scaling_dim: int = option(1)
    fp8_quant_fwd_inp: QParams = option(QParams(), te=False)
    fp8_quant_fwd_weight: QParams = option(QParams(), te=False)
    fp8_quant_bwd_grad: QParams = option(QParams(), te=False)
    fp8_gemm_fprop: MMParams = option(MMParams(use_split_accumulator=True))
    fp8_gemm_dgrad: MMParams = option(MMParams(use_split_accumulator=True))
    fp8_gemm_wgrad: MMParams = option(MMParams(use_split_accumulator=True))
    tp_only_amax_red: bool = option(
        False,
        te=False,
        megatron="tp_only_amax_red",
        ignored="block scaling takes the amax of a block and reduces none over ranks",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        QParams(amax_epsilon=self.amax_epsilon)  # the same limits
        dimensions = ("x_block_scaling_dim", "w_block_scaling_dim", "grad_block_scaling_dim")
        for key in dimensions:
            if getattr(self, key) not in (1, 2):
                raise self.refuse(key, "is not a block shape", allowed=["1 (1x128)", "2 (128x128)"])
        for first, second in combinations(dimensions, 2):
            if getattr(self, first) == getattr(self, second) == 2:
                raise self.refuse(
                    first,
                    f"cannot go with {second}=2: a GEMM multiplies the two, and TE has no 2D by 2D one",
                    hint="At most one of x_, w_ and grad_block_scaling_dim can be 2; "
                    "w_block_scaling_dim is 2 unless set to 1.",
                )
        for key in ("fp8_gemm_fprop", "fp8_gemm_dgrad", "fp8_gemm_wgrad"):
            if not getattr(self, key).use_split_accumulator:
                raise self.refuse(
                    key,
                    "is not possible: block scaling needs the split accumulator",
                    allowed=["{use_split_accumulator: true}"],
                )
        if self.fp8_dpa:
            raise self.refuse(
                "fp8_dpa", "is not possible: TE has no FP8 attention for block scaling", allowed=[False]
            )

    def quantization(self) -> dict[TensorName, QParams]:
        """The parameters in effect for each operand, nothing left null."""
        own = (self.fp8_quant_fwd_inp, self.fp8_quant_fwd_weight, self.fp8_quant_bwd_grad)
        return {
            name: params.over(power_2_scale=not self.use_f32_scales, amax_epsilon=self.amax_epsilon)
            for name, params in zip(OPERANDS, own, strict=True)
        }

    def operands(self) -> dict[TensorName, OperandPlan]:
        dimensions = (self.x_block_scaling_dim, self.w_block_scaling_dim, self.grad_block_scaling_dim)
        quantization = self.quantization()
        return self._without_backward(
            {
                name: OperandPlan(
                    format=self.backward_format if name == "grad_output" else self.forward_format,
                    scaling="block",
                    block=(BLOCK if dimension == 2 else 1, BLOCK),
                    scale_dtype="fp32",
                    power_of_two=bool(quantization[name].power_2_scale),
                )
                for name, dimension in zip(OPERANDS, dimensions, strict=True)
            }
        )
