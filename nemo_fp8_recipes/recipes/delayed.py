"""Per-tensor scaling from a history of amax values: `transformer_engine.common.recipe.DelayedScaling`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from nemo_fp8_recipes.errors import nearest
from nemo_fp8_recipes.recipes.base import BackwardOverride, Fp8FormatName, QuantizedRecipe
from nemo_fp8_recipes.recipes.options import OPERANDS, OperandPlan, TensorName, option

__all__ = ["AMAX_ALGORITHMS", "Delayed", "is_dotted_path"]

AMAX_ALGORITHMS = ("max", "most_recent")
LARGEST_MARGIN = 17
"""E4M3 holds 448 down to 2^-9: with more, not even the largest element is left of a tensor."""
_DOTTED_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def is_dotted_path(text: str) -> bool:
    """Whether `text` names a Python object as `package.module:function`."""
    return _DOTTED_PATH.fullmatch(text) is not None


@dataclass(frozen=True, kw_only=True)
class Delayed(QuantizedRecipe):
    """The scale of a step comes from the amax values of earlier steps: scale = FP8 max / amax / 2^margin.

    `amax_compute_algo` is "max", "most_recent" or the path `package.module:function` of a function that takes
    the history [length, tensors] and returns the amax values [tensors]; `scaling_factor_compute_algo` is null
    or such a path to `(amax, old_scale, fp8_max, recipe) -> scale`. With either function TE leaves its fused
    update for an unfused Python one.
    """

    name: ClassVar[str] = "delayed"
    precision: ClassVar[Literal["bf16", "fp8", "fp4"]] = "fp8"
    te_class: ClassVar[str | None] = "DelayedScaling"
    since: ClassVar[str | None] = "1.0"

    fp8_format: Fp8FormatName = option("hybrid")
    margin: int = option(0, megatron="fp8_margin")
    amax_history_len: int = option(1024, megatron="fp8_amax_history_len")
    amax_compute_algo: str = option("max", megatron="fp8_amax_compute_algo")
    scaling_factor_compute_algo: str | None = option(None)
    reduce_amax: bool = option(True)
    backward_override: BackwardOverride | None = option(None, since="2.15")
    fp8_wgrad: bool = option(
        True,
        te=False,
        megatron="fp8_wgrad",
        ignored="Megatron hands it on as override_linear_precision, which TE drops without a word since 2.0",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.margin < 0:
            raise self.refuse("margin", "would scale beyond the FP8 range and saturate", allowed=[">= 0"])
        if self.margin > LARGEST_MARGIN:
            raise self.refuse(
                "margin", "would scale every element to zero", allowed=[f">= 0 and <= {LARGEST_MARGIN}"]
            )
        if self.amax_history_len < 1:
            raise self.refuse("amax_history_len", "is out of range", allowed=[">= 1"])
        if self.amax_compute_algo not in AMAX_ALGORITHMS and not is_dotted_path(self.amax_compute_algo):
            close = nearest(self.amax_compute_algo, AMAX_ALGORITHMS)
            raise self.refuse(
                "amax_compute_algo",
                "is neither a known algorithm nor the path of a function",
                allowed=[*AMAX_ALGORITHMS, "package.module:function"],
                hint=f"Did you mean '{close}'?" if close else None,
            )
        if self.scaling_factor_compute_algo is not None and not is_dotted_path(
            self.scaling_factor_compute_algo
        ):
            raise self.refuse(
                "scaling_factor_compute_algo",
                "is not the path of a function",
                allowed=["null", "package.module:function"],
            )
        if self.backward_override is not None:
            raise self.refuse(
                "backward_override",
                "is not possible: TE's delayed scaling runs the backward GEMMs in FP8 only",
                allowed=["null"],
                hint="fp8_recipe=tensorwise takes it.",
            )
        if self.tp_only_amax_red and not self.reduce_amax:
            raise self.refuse(
                "tp_only_amax_red", "would change nothing: with reduce_amax=false no amax is reduced"
            )
        for key in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
            if getattr(self, key):
                raise self.refuse(
                    key,
                    "is not possible: Megatron enters delayed scaling once around all layers, so that the "
                    "amax history is updated once a step, and cannot leave single layers out",
                    allowed=[0],
                    hint="fp8_recipe=tensorwise, blockwise and mxfp8 take it.",
                )

    def operands(self) -> dict[TensorName, OperandPlan]:
        return {
            name: OperandPlan(
                format=self.backward_format if name == "grad_output" else self.forward_format,
                scaling="delayed",
                block=None,
                scale_dtype="fp32",
                power_of_two=False,
            )
            for name in OPERANDS
        }
