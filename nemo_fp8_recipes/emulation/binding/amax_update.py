"""Delayed scaling: histories and scales after the amax reduction.

Follows `pytorch/csrc/extensions/recipe.cpp` and `common/recipe/delayed_scaling.cu` of Transformer Engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.binding.checks import nvte_check
from nemo_fp8_recipes.emulation.binding.dtypes import fp8_format
from nemo_fp8_recipes.numerics.delayed import AMAX_ALGORITHMS, update_amax_and_scale

__all__ = ["fused_amax_and_scale_update_after_reduction"]


@torch.inference_mode()  # what an evaluation in that mode has made can be written to in that mode alone
def fused_amax_and_scale_update_after_reduction(
    amax_reduction_buffer: Tensor,
    amax_histories: Sequence[Tensor],
    scales: Sequence[Tensor],
    amax_compute_algo: str,
    fp8_dtype: Any,
    margin: float,
) -> None:
    """Roll every history [length, columns] by one step and set every scale [columns], in place.

    `amax_reduction_buffer` holds the live rows of all histories, reduced over ranks.
    """
    nvte_check(
        amax_compute_algo in AMAX_ALGORITHMS,
        "common/recipe/delayed_scaling.cu",
        f"Unsupported amax compute algorithm ({amax_compute_algo})",
    )
    by_length: dict[int, list[int]] = {}
    for number, history in enumerate(amax_histories):
        by_length.setdefault(history.shape[0], []).append(number)
    live = amax_reduction_buffer.split([history.shape[1] for history in amax_histories])
    for numbers in by_length.values():
        update_amax_and_scale(
            [amax_histories[number] for number in numbers],
            [scales[number] for number in numbers],
            torch.cat([live[number] for number in numbers]),
            algorithm=amax_compute_algo,
            fp8_max=fp8_format(fp8_dtype).max,
            margin=margin,
        )
