"""The baseline: nothing is quantised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from nemo_fp8_recipes.recipes.base import Recipe
from nemo_fp8_recipes.recipes.options import OperandPlan, TensorName

__all__ = ["Bf16"]


@dataclass(frozen=True, kw_only=True)
class Bf16(Recipe):
    """BF16 training, what the other recipes are compared with. It has no options."""

    name: ClassVar[str] = "bf16"
    precision: ClassVar[Literal["bf16", "fp8", "fp4"]] = "bf16"

    # What code that handles any recipe reads; constants here, so that setting one is an unknown key.
    fp8_format: ClassVar[None] = None
    num_layers_at_start_in_bf16: ClassVar[int] = 0
    num_layers_at_end_in_bf16: ClassVar[int] = 0
    layers_in_bf16: ClassVar[int] = 0
    fp8_param: ClassVar[bool] = False
    fp8_dpa: ClassVar[bool] = False
    fp8_mha: ClassVar[bool] = False
    tp_only_amax_red: ClassVar[bool] = False
    backward_override: ClassVar[None] = None

    def operands(self) -> dict[TensorName, OperandPlan]:
        return {}
