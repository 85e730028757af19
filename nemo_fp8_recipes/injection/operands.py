"""Reading one Transformer Engine quantizer: the recipe it belongs to and what it does to an operand.

Only attributes of the quantizer in use are read, never the recipe that was meant to make it. Attribute names
are those of `transformer_engine/pytorch/tensor/*_tensor.py`.
"""

from __future__ import annotations

from typing import Any

from nemo_fp8_recipes.injection.rows import OperandRow

__all__ = ["high_precision", "read_quantizer", "recipe_of"]

_RECIPE_OF_QUANTIZER = {
    "Float8Quantizer": "delayed",
    "Float8CurrentScalingQuantizer": "tensorwise",
    "Float8BlockQuantizer": "blockwise",
    "MXFP8Quantizer": "mxfp8",
    "NVFP4Quantizer": "nvfp4",
}

_FORMAT_OF_DTYPE = {"kFloat8E4M3": "e4m3", "kFloat8E5M2": "e5m2", "kFloat4E2M1": "e2m1"}


def recipe_of(quantizer: Any) -> str:
    """Canonical name of the recipe whose quantizer this is; "custom" for any other class."""
    return _RECIPE_OF_QUANTIZER.get(type(quantizer).__name__, "custom")


def high_precision(dtype: Any) -> OperandRow:
    """An operand that is not quantised, of a torch dtype."""
    return OperandRow(format=str(dtype).removeprefix("torch."), scaling="none")


def read_quantizer(quantizer: Any, *, amax_history_len: int | None = None) -> OperandRow:
    """What a quantizer does to its operand.

    Args:
        quantizer: a Transformer Engine quantizer.
        amax_history_len: rows of the window the quantizer's amax is a view of; delayed scaling only.
    """
    recipe = recipe_of(quantizer)
    columnwise = bool(quantizer.columnwise_usage)
    fmt = format_of(quantizer.dtype) if hasattr(quantizer, "dtype") else "unknown"
    if recipe == "delayed":
        return OperandRow(
            fmt, "delayed", scale_dtype="fp32", columnwise=columnwise, amax_history_len=amax_history_len
        )
    if recipe == "tensorwise":
        return OperandRow(
            fmt,
            "tensorwise",
            scale_dtype="fp32",
            power_of_two=bool(quantizer.force_pow_2_scales),
            amax_epsilon=float(quantizer.amax_epsilon),
            columnwise=columnwise,
        )
    if recipe == "blockwise":
        length = int(quantizer.block_len)
        return OperandRow(
            fmt,
            "block",
            block=(length if quantizer.block_scaling_dim == 2 else 1, length),
            scale_dtype="fp32",
            power_of_two=bool(quantizer.force_pow_2_scales),
            amax_epsilon=float(quantizer.amax_epsilon),
            columnwise=columnwise,
        )
    if recipe == "mxfp8":
        # `with_2d_quantization` exists since Transformer Engine 2.19; before, every MXFP8 block is 1x32.
        two_dimensional = bool(getattr(quantizer, "with_2d_quantization", False))
        return OperandRow(
            fmt,
            "block",
            block=(32 if two_dimensional else 1, 32),
            scale_dtype="e8m0",
            power_of_two=True,
            columnwise=columnwise,
        )
    if recipe == "nvfp4":
        return OperandRow(
            fmt,
            "block",
            block=(16 if quantizer.with_2d_quantization else 1, 16),
            scale_dtype="e4m3",
            columnwise=columnwise,
            random_hadamard_transform=bool(quantizer.with_rht),
            stochastic_rounding=bool(quantizer.stochastic_rounding),
        )
    return OperandRow(fmt, "custom", columnwise=columnwise)


def format_of(dtype: Any) -> str:
    """ "e4m3", "e5m2" or "e2m1" of one of Transformer Engine's dtype enumerators; its own name for any
    other.
    """
    return _FORMAT_OF_DTYPE.get(dtype.name, dtype.name)
