"""What each recipe makes of a matrix, by `numerics/`, on the matrix' own device.

Every recipe has its default options. Blocks lie along the rows, as for the forward and the input-gradient
GEMM. Of a matrix of all experts each has an amax and scales of its own; where its rows are, the device knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nemo_fp8_recipes.numerics import FORMATS, amax, blockwise, mxfp8, nvfp4
from nemo_fp8_recipes.numerics.cast import decode, scale_and_cast
from nemo_fp8_recipes.numerics.formats import E4M3
from nemo_fp8_recipes.numerics.fp4 import E2M1_MAX
from nemo_fp8_recipes.numerics.scale import FLT_MAX, reciprocal, scale_from_amax
from nemo_fp8_recipes.telemetry.groups import Experts
from nemo_fp8_recipes.telemetry.probes.stored import Stored, per_block_limit

__all__ = ["SIMULATORS", "largest", "under_scale"]


def largest(x: Tensor, experts: Experts | None) -> Tensor:
    """The amax of x, fp32 (1,), or of the rows of each expert, fp32 (members,): 0 of one without rows."""
    if experts is None:
        return amax(x).reshape(1)
    return experts.largest(amax(x, dim=1))


def under_scale(x: Tensor, fmt: str, scale: Tensor, experts: Experts | None) -> Stored:
    """x cast to FP8 with a scale that is known.

    Args:
        x: (rows, columns).
        fmt: "e4m3" or "e5m2".
        scale: fp32, as `largest` gives an amax.
    """
    if experts is not None:
        scale = scale[experts.of_row][:, None]
    scale_inv = reciprocal(scale)
    values = decode(scale_and_cast(x, scale, FORMATS[fmt]), FORMATS[fmt]).mul_(scale_inv)
    return Stored(values, scale_inv * FORMATS[fmt].max)


def _tensorwise(x: Tensor, _: str, fmt: str, experts: Experts | None) -> Stored | None:
    scale = scale_from_amax(largest(x, experts), FORMATS[fmt].max, overflow_value=FLT_MAX)
    return under_scale(x, fmt, scale, experts)


def _blockwise(x: Tensor, tensor: str, fmt: str, experts: Experts | None) -> Stored | None:
    if tensor == "weight":
        block = (blockwise.BLOCK, blockwise.BLOCK)
        return _together(
            [
                Stored(
                    blockwise.dequantize_2d(*made, FORMATS[fmt]),
                    per_block_limit(made.scale_inv, FORMATS[fmt].max, block, part.shape),
                )
                for part in _weights(x, experts)
                for made in (blockwise.quantize_2d(part, FORMATS[fmt]),)
            ]
        )
    made = blockwise.quantize_1d(x, FORMATS[fmt])
    limit = per_block_limit(made.scale_inv, FORMATS[fmt].max, (1, blockwise.BLOCK), x.shape)
    return Stored(blockwise.dequantize_1d(*made, FORMATS[fmt]), limit)


def _mxfp8(x: Tensor, _: str, fmt: str, __: Experts | None) -> Stored | None:
    made = mxfp8.quantize_rowwise(x, FORMATS[fmt])
    scale_inv = mxfp8.e8m0_to_fp32(made.scale_e8m0)
    return Stored(
        mxfp8.dequantize_rowwise(*made, FORMATS[fmt]),
        per_block_limit(scale_inv, FORMATS[fmt].max, (1, mxfp8.BLOCK), x.shape),
    )


def _nvfp4(x: Tensor, tensor: str, _: str, experts: Experts | None) -> Stored | None:
    if x.shape[1] % nvfp4.BLOCK:
        return None  # NVFP4 cannot quantise it
    if tensor == "weight":
        parts = [(part, amax(part).reshape(1)) for part in _weights(x, experts)]
        block = (nvfp4.BLOCK, nvfp4.BLOCK)
        return _together([_nvfp4_values(nvfp4.quantize_2d(*one), one[1], block, one[0]) for one in parts])
    found = largest(x, experts)
    if experts is not None:
        found = found[experts.of_row]
    # Rounded to nearest also where the recipe rounds gradients stochastically: the same in every run.
    return _nvfp4_values(nvfp4.quantize_1d(x, found), found, (1, nvfp4.BLOCK), x)


def _nvfp4_values(made: nvfp4.Blocks, of: Tensor, block: tuple[int, int], x: Tensor) -> Stored:
    scale_inv = decode(made.scale_e4m3, E4M3).mul_(of.reshape(-1, 1)).mul_(1.0 / (E4M3.max * E2M1_MAX))
    return Stored(nvfp4.dequantize(*made, of), per_block_limit(scale_inv, E2M1_MAX, block, x.shape))


def _weights(x: Tensor, experts: Experts | None) -> Sequence[Tensor]:
    """The weight of each expert; all have as many rows."""
    return (x,) if experts is None else x.chunk(experts.members)


def _together(parts: Sequence[Stored]) -> Stored:
    if len(parts) == 1:
        return parts[0]
    return Stored(torch.cat([part.values for part in parts]), torch.cat([part.limit for part in parts]))


SIMULATORS: dict[str, Callable[[Tensor, str, str, Experts | None], Stored | None]] = {
    "tensorwise": _tensorwise,
    "blockwise": _blockwise,
    "mxfp8": _mxfp8,
    "nvfp4": _nvfp4,
}
"""By recipe: of a matrix (rows, columns), the operand's name, the element format and the experts. None where
the recipe cannot quantise it. Delayed scaling knows its scale from elsewhere: `under_scale`.
"""
