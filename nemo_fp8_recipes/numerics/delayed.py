"""Per-tensor delayed scaling: the scale comes from the amax history of earlier steps.

Follows Transformer Engine's `recipe/delayed_scaling.cu` (the fused update after the amax reduction) and
`cast/fp8/quantize_fp8.cuh`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_fp8_recipes.errors import RecipeError, nearest
from nemo_fp8_recipes.numerics.formats import Fp8Format
from nemo_fp8_recipes.numerics.scale import FLT_MAX, amax, reciprocal
from nemo_fp8_recipes.numerics.tensorwise import quantize

__all__ = ["AMAX_ALGORITHMS", "QuantizedDelayed", "quantize_delayed", "update_amax_and_scale"]

AMAX_ALGORITHMS = ("max", "most_recent")


class QuantizedDelayed(NamedTuple):
    """A tensor quantised with the scale of earlier steps.

    Attributes:
        codes: uint8, shape of the input.
        amax: fp32 (1,), largest magnitude of this input; the caller takes the maximum of it and the live
            history row.
        scale_inv: fp32 (1,), 1 / scale.
    """

    codes: Tensor
    amax: Tensor
    scale_inv: Tensor


def quantize_delayed(
    x: Tensor, fmt: Fp8Format, scale: Tensor, *, out: Tensor | None = None
) -> QuantizedDelayed:
    """Quantise x with a scale that is already known, and observe its amax.

    Args:
        x: fp32, bf16 or fp16, any shape, empty allowed.
        fmt: element format.
        scale: fp32, one element.
        out: uint8 of x's shape to write the codes into.
    """
    return QuantizedDelayed(
        quantize(x, fmt, scale, out=out), amax(x).reshape(1), reciprocal(scale.reshape(1))
    )


def update_amax_and_scale(
    histories: Sequence[Tensor],
    scales: Sequence[Tensor],
    reduced_amax: Tensor | None,
    *,
    algorithm: str,
    fp8_max: float,
    margin: float = 0.0,
) -> None:
    """Roll the amax histories by one step and set the next scales, in place.

    Per column: the newest amax is the reduced one, or history row 0 where that is zero. If it is zero,
    history and scale stay. Otherwise history rows move up by one, the newest amax becomes the last row and
    row 0 is cleared. The scale becomes fp8_max * 2^-margin / amax, where amax is the newest ("most_recent")
    or the largest of the newest and the rows that moved, NaN ignored ("max"); an amax of infinity or NaN
    keeps the old scale; an infinite scale becomes `FLT_MAX`.

    Args:
        histories: fp32 [length, columns_i] each, one length for all.
        scales: fp32 [columns_i] each.
        reduced_amax: fp32 [sum of columns_i], the live rows of all histories after the reduction over ranks;
            None when there was no reduction.
        algorithm: "max" or "most_recent".
        fp8_max: largest finite value of the element format.
        margin: powers of two kept free above the amax.

    Raises:
        RecipeError: unknown algorithm.
    """
    if algorithm not in AMAX_ALGORITHMS:
        close = nearest(algorithm, AMAX_ALGORITHMS)
        raise RecipeError(
            f"There is no amax algorithm {algorithm!r}.",
            key="amax_compute_algo",
            value=algorithm,
            allowed=AMAX_ALGORITHMS,
            hint=f"Did you mean {close}?" if close else None,
        )
    if not histories:
        return
    history = torch.cat(list(histories), dim=1)
    old_scale = torch.cat(list(scales))

    newest = history[0]
    if reduced_amax is not None:
        newest = torch.where(reduced_amax != 0.0, reduced_amax, newest)
    moved = torch.cat((history[1:], newest.unsqueeze(0)))
    seen = amax(moved, dim=0) if algorithm == "max" else newest
    moved[0] = 0.0

    observed = newest != 0.0
    usable = observed & torch.isfinite(seen) & (seen > 0.0)
    scaled_max = torch.full_like(seen, fp8_max * math.pow(2.0, -margin))
    new_scale = torch.where(usable, torch.div(scaled_max, seen), old_scale)
    new_scale = torch.where(torch.isinf(new_scale), FLT_MAX, new_scale)
    new_history = torch.where(observed, moved, history)

    widths = [part.shape[1] for part in histories]
    torch._foreach_copy_(list(histories), list(new_history.split(widths, dim=1)))
    torch._foreach_copy_(list(scales), list(new_scale.split(widths)))
