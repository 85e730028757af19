"""What `numerics/` makes of a case: the buffers that TE's tensor would hold, without their padding."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_fp8_recipes import numerics
from nemo_fp8_recipes.numerics import FORMATS, blockwise, hadamard, mxfp8, nvfp4, tensorwise
from nemo_fp8_recipes.numerics.scale import reciprocal
from nemo_fp8_recipes.selftest.cases import Case

__all__ = ["expected"]


def expected(case: Case, x: Tensor) -> dict[str, Tensor]:
    """Name of a buffer -> its content. `columnwise_*` of blockwise and NVFP4 are those of the transposed
    matrix, as TE stores them; scales are in natural order, a row of blocks a row.
    """
    return _RECIPES[case.recipe](case, x)


def _delayed(case: Case, x: Tensor) -> dict[str, Tensor]:
    scale = torch.tensor([case.options["scale"]])
    codes = tensorwise.quantize(x, FORMATS[case.options["fmt"]], scale)
    return {"data": codes, "scale_inv": reciprocal(scale), "amax": numerics.amax(x).reshape(1)}


def _tensorwise(case: Case, x: Tensor) -> dict[str, Tensor]:
    options = case.options
    found = tensorwise.quantize_current(
        x,
        FORMATS[options["fmt"]],
        epsilon=options.get("epsilon", 0.0),
        power_of_two=options.get("power_of_two", False),
    )
    return {"data": found.codes, "scale_inv": found.scale_inv}


def _blockwise(case: Case, x: Tensor) -> dict[str, Tensor]:
    fmt, epsilon = FORMATS[case.options["fmt"]], case.options["epsilon"]
    if case.options["dim"] == 2:
        rows = columns = blockwise.quantize_2d(x, fmt, epsilon=epsilon)
    else:
        rows = blockwise.quantize_1d(x, fmt, epsilon=epsilon)
        columns = blockwise.quantize_1d_columnwise(x, fmt, epsilon=epsilon)
    return {
        "rowwise_data": rows.codes,
        "rowwise_scale_inv": rows.scale_inv,
        "columnwise_data": columns.codes.t().contiguous(),
        "columnwise_scale_inv": columns.scale_inv.t().contiguous(),
    }


def _mxfp8(case: Case, x: Tensor) -> dict[str, Tensor]:
    fmt = FORMATS[case.options["fmt"]]
    rows, columns = mxfp8.quantize_rowwise(x, fmt), mxfp8.quantize_columnwise(x, fmt)
    return {
        "rowwise_data": rows.codes,
        "rowwise_scale_inv": rows.scale_e8m0,
        "columnwise_data": columns.codes,
        "columnwise_scale_inv": columns.scale_e8m0,
    }


def _nvfp4(case: Case, x: Tensor) -> dict[str, Tensor]:
    two_d, divided = case.options["two_d"], case.options.get("divided", False)
    found = {}
    columns = x.t().contiguous()
    if case.options.get("hadamard"):
        columns = hadamard.random_hadamard_transform(columns)
    for direction, matrix in (("rowwise", x), ("columnwise", columns)):
        largest = numerics.amax(matrix).reshape(1)
        quantize = nvfp4.quantize_2d if two_d else nvfp4.quantize_1d
        packed, scale = quantize(matrix, largest, divided=divided)
        found[f"{direction}_data"] = packed
        found[f"{direction}_scale_inv"] = scale.repeat_interleave(16, dim=0) if two_d else scale
        found[f"amax_{direction}"] = largest
    return found


_RECIPES = {
    "delayed": _delayed,
    "tensorwise": _tensorwise,
    "blockwise": _blockwise,
    "mxfp8": _mxfp8,
    "nvfp4": _nvfp4,
}
