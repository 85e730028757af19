"""Per-tensor scaling from the tensor's own amax: `transformer_engine.common.recipe.Float8CurrentScaling`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from nemo_fp8_recipes.recipes.base import Fp8FormatName, QuantizedRecipe
from nemo_fp8_recipes.recipes.options import OPERANDS, MMParams, OperandPlan, QParams, TensorName, option

__all__ = ["Tensorwise"]


@dataclass(frozen=True, kw_only=True)
class Tensorwise(QuantizedRecipe):
    """One scale a tensor, FP8 max / amax, from the tensor that is being cast.

    `use_power_2_scales` and `amax_epsilon` hold for every operand that `fp8_quant_*` says nothing about. TE's
    own constructor takes the first and drops it; `targets.transformer_engine` puts both into effect.
    """

    name: ClassVar[str] = "tensorwise"
    precision: ClassVar[Literal["bf16", "fp8", "fp4"]] = "fp8"
    te_class: ClassVar[str | None] = "Float8CurrentScaling"
    since: ClassVar[str | None] = "2.2"

    fp8_format: Fp8FormatName = option("hybrid")
    use_power_2_scales: bool = option(False)
    amax_epsilon: float = option(0.0, te=False)
    fp8_quant_fwd_inp: QParams = option(QParams(), te=False)
    fp8_quant_fwd_weight: QParams = option(QParams(), te=False)
    fp8_quant_bwd_grad: QParams = option(QParams(), te=False)
    fp8_gemm_fprop: MMParams = option(MMParams(use_split_accumulator=False))
    fp8_gemm_dgrad: MMParams = option(MMParams(use_split_accumulator=True))
    fp8_gemm_wgrad: MMParams = option(MMParams(use_split_accumulator=True))

    def __post_init__(self) -> None:
        super().__post_init__()
        QParams(amax_epsilon=self.amax_epsilon)  # the same limits
        if self.tp_only_amax_red and not self.fp8_dpa:
            raise self.refuse(
                "tp_only_amax_red",
                "would change nothing: without fp8_dpa current scaling reduces no amax over Megatron's group",
            )

    def quantization(self) -> dict[TensorName, QParams]:
        """The parameters in effect for each operand, nothing left null."""
        own = (self.fp8_quant_fwd_inp, self.fp8_quant_fwd_weight, self.fp8_quant_bwd_grad)
        return {
            name: params.over(power_2_scale=self.use_power_2_scales, amax_epsilon=self.amax_epsilon)
            for name, params in zip(OPERANDS, own, strict=True)
        }

    def operands(self) -> dict[TensorName, OperandPlan]:
        return self._without_backward(
            {
                name: OperandPlan(
                    format=self.backward_format if name == "grad_output" else self.forward_format,
                    scaling="tensorwise",
                    block=None,
                    scale_dtype="fp32",
                    power_of_two=bool(params.power_2_scale),
                )
                for name, params in self.quantization().items()
            }
        )
