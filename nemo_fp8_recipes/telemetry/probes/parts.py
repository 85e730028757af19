"""A part of a quantised matrix: the values of some of its elements, and what the codes say of the others.

A rank that has the high-precision copy of some elements of a weight has the codes of all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_fp8_recipes.numerics import FORMATS
from nemo_fp8_recipes.numerics.formats import Fp8Format
from nemo_fp8_recipes.telemetry.coded import Coded
from nemo_fp8_recipes.telemetry.elements import bulk_sample
from nemo_fp8_recipes.telemetry.probes.index import IndexCache
from nemo_fp8_recipes.telemetry.probes.stored import Stored, in_order, scale_inverses, values

__all__ = ["bulk_limit", "values_between"]


def values_between(coded: Coded, first: int, last: int, indices: IndexCache) -> Stored:
    """The values of the elements `first` to `last` (exclusive), counted row by row. Decodes the rows that
    they lie in, to the edges of their blocks. Waits for nothing.

    Returns:
        fp32 (1, last - first) each.
    """
    rows, columns = coded.shape
    top, bottom = first // columns, -(-last // columns)
    whole = in_order(coded, indices)
    if whole.scales.numel() == 1:
        some = whole._replace(codes=whole.codes[top:bottom], block=(bottom - top, columns))
    else:
        height = whole.block[0]
        top, bottom = top - top % height, min(rows, -(-bottom // height) * height)
        some = whole._replace(
            codes=whole.codes[top:bottom], scales=whole.scales[top // height : -(-bottom // height)]
        )
        if whole.amax is not None and whole.amax.numel() > 1:
            some = some._replace(amax=whole.amax[top:bottom])
    found = values(some, indices)
    chosen = slice(first - top * columns, last - top * columns)
    limit = found.limit
    if limit.numel() > 1:
        limit = limit.reshape(-1)[chosen][None]
    return Stored(found.values.reshape(-1)[chosen][None], limit)


def bulk_limit(coded: Coded, indices: IndexCache) -> Tensor:
    """Magnitude that all but the largest 1 % of the elements do not exceed, as far as the codes tell it: were
    the elements of a code spread evenly over what is rounded to it. Of large tensors it is that of an even
    sample, as in `elements.measure`. The same for every part of the tensor. Waits for nothing.

    Returns:
        fp32, one element.
    """
    rows, columns = coded.shape
    stride, top = bulk_sample(rows * columns, columns)
    whole = in_order(coded, indices)
    places = torch.arange(0, rows * columns, stride, device=coded.codes.device)
    row = places.div(columns, rounding_mode="floor")
    column = places - row * columns
    if coded.format == "e2m1":
        pairs = whole.codes[row, column.bitwise_right_shift(1)]
        codes = pairs.bitwise_right_shift(column.bitwise_and(1).mul(4).to(torch.uint8)).bitwise_and(15)
    else:
        codes = whole.codes[row, column]
    down, across = (
        at.div(size, rounding_mode="floor") for at, size in zip((row, column), whole.block, strict=True)
    )
    amax = whole.amax
    if amax is not None and amax.numel() > 1:
        amax = amax.reshape(-1)[row]
    scale_inv = scale_inverses(whole.scales[down, across][:, None], amax).reshape(-1)
    lower, width = _intervals(coded.format, codes).index_select(1, codes.to(torch.int32))
    # The golden section's multiples are spread evenly, whichever of them are taken.
    spread = places.div_(stride, rounding_mode="floor").mul_(_GOLDEN).bitwise_and_(0xFFFF).to(torch.float32)
    magnitudes = width.mul_(spread.mul_(2.0**-16)).add_(lower).mul_(scale_inv)
    magnitudes.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    return magnitudes.topk(top, sorted=False).values.amin()


_GOLDEN = 40503
"""The golden section, in units of 2^-16."""

_uploaded: dict[tuple[str, torch.device], Tensor] = {}


def _intervals(fmt: str, like: Tensor) -> Tensor:
    """The smallest magnitude that is rounded to each code and how far it is to the largest, fp32 (2, number
    of codes), where `like` is; 0 of codes that are no numbers. Uploaded once: a copy to a GPU waits for it.
    """
    # Tensors of another kind, such as those that only say what they would be, mix with none of torch's own.
    kept = type(like) is Tensor
    intervals = _uploaded.get((fmt, like.device)) if kept else None
    if intervals is None:
        intervals = torch.tensor(_lower_and_width(fmt), dtype=torch.float32).to(like.device)
        if kept:
            _uploaded[fmt, like.device] = intervals
    return intervals


def _lower_and_width(fmt: str) -> tuple[list[float], list[float]]:
    """Rounding changes halfway between two codes; as far above the largest magnitude as below it."""
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0] if fmt == "e2m1" else _magnitudes(FORMATS[fmt])
    above = [*magnitudes[1:], 2 * magnitudes[-1] - magnitudes[-2]]
    upper = [(low + high) / 2 for low, high in zip(magnitudes, above, strict=True)]
    lower = [0.0, *upper[:-1]]
    width = [high - low for low, high in zip(lower, upper, strict=True)]
    no_numbers = [0.0] * ((8 if fmt == "e2m1" else 128) - len(upper))
    return [*lower, *no_numbers] * 2, [*width, *no_numbers] * 2


def _magnitudes(fmt: Fp8Format) -> list[float]:
    """What the codes of finite numbers that are not negative stand for, in their order."""
    steps = 2**fmt.mantissa_bits
    magnitudes = [code * fmt.min_subnormal for code in range(steps)]
    for code in range(steps, 128):
        exponent, mantissa = divmod(code, steps)
        magnitude = (steps + mantissa) * 2.0 ** (exponent - 1) * fmt.min_subnormal
        if magnitude > fmt.max:
            break
        magnitudes.append(magnitude)
    return magnitudes
