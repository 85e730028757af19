"""The vocabulary recipes are written in: an option with its history, and TE's two option groups."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from nemo_fp8_recipes.errors import RecipeError

__all__ = ["OPERANDS", "MMParams", "OperandPlan", "QParams", "TensorName", "option"]

TensorName = Literal["input", "weight", "grad_output"]
OPERANDS: tuple[TensorName, ...] = ("input", "weight", "grad_output")


def option(
    default: Any,
    *,
    since: str | None = None,
    te: bool = True,
    megatron: str | None = None,
    ignored: str = "",
) -> Any:
    """A recipe field with its history.

    Args:
        default: the value that conf/fp8_recipe/<name>.yaml gives too.
        since: the first Transformer Engine version that honours it; None: as old as the recipe's class.
        te: whether TE's class has an option of this name.
        megatron: the TransformerConfig field that carries it, where Megatron has one.
        ignored: why setting it would change nothing; another value than the default is refused with it.
    """
    return dataclasses.field(
        default=default, metadata={"since": since, "te": te, "megatron": megatron, "ignored": ignored}
    )


@dataclass(frozen=True, kw_only=True)
class MMParams:
    """How one GEMM accumulates, as TE's class of this name.

    `use_split_accumulator`: add partial sums up in FP32 outside the tensor core; off is fast accumulation.
    """

    use_split_accumulator: bool = True


@dataclass(frozen=True, kw_only=True)
class QParams:
    """How one operand is scaled; null follows the recipe's own option.

    `power_2_scale`: round the scale down to a power of two.
    `amax_epsilon`: smallest amax that the scale is computed from.
    """

    power_2_scale: bool | None = None
    amax_epsilon: float | None = None

    def __post_init__(self) -> None:
        if self.amax_epsilon is not None and not (
            math.isfinite(self.amax_epsilon) and self.amax_epsilon >= 0
        ):
            raise RecipeError(
                f"amax_epsilon={self.amax_epsilon} is out of range.",
                key="fp8_recipe.amax_epsilon",
                value=self.amax_epsilon,
                allowed=["a finite number >= 0"],
            )

    def over(self, *, power_2_scale: bool, amax_epsilon: float) -> QParams:
        """These parameters where given, else the recipe's."""
        return QParams(
            power_2_scale=power_2_scale if self.power_2_scale is None else self.power_2_scale,
            amax_epsilon=amax_epsilon if self.amax_epsilon is None else self.amax_epsilon,
        )


@dataclass(frozen=True, kw_only=True)
class OperandPlan:
    """What a recipe does to one operand of a linear layer's GEMMs.

    `block` is the shape of elements that share a scale, the GEMM's inner dimension last; None: the whole
    tensor. `power_of_two` says that every scale is one.
    """

    format: Literal["e4m3", "e5m2", "e2m1"]
    scaling: Literal["delayed", "tensorwise", "block"]
    block: tuple[int, int] | None
    scale_dtype: Literal["fp32", "e8m0", "e4m3"]
    power_of_two: bool
