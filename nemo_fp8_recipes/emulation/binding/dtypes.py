"""Between Transformer Engine's element types, torch's, and the FP8 and FP4 formats of `numerics`."""

from __future__ import annotations

from typing import Any

import torch

from nemo_fp8_recipes.emulation.binding.checks import nvte_error
from nemo_fp8_recipes.numerics.formats import E4M3, E5M2, Fp8Format

__all__ = ["element_format", "fp8_format", "require_high_precision", "short_name", "te_name", "torch_dtype"]

_TORCH: dict[int, torch.dtype] = {
    0: torch.uint8,
    2: torch.int32,
    4: torch.float32,
    5: torch.float16,
    6: torch.bfloat16,
}
_FP8: dict[int, Fp8Format] = {7: E4M3, 8: E5M2}
_FP4 = 10
_SHORT: dict[torch.dtype, str] = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}
_NAMES: dict[torch.dtype, str] = {
    torch.float32: "Float32",
    torch.float16: "Float16",
    torch.bfloat16: "BFloat16",
    torch.uint8: "Byte",
    torch.bool: "Byte",
    torch.int16: "Int16",
    torch.int32: "Int32",
    torch.int64: "Int64",
    torch.float8_e4m3fn: "Float8E4M3",
    torch.float8_e5m2: "Float8E5M2",
}
# The dtypes that TE's C++ does not know have the number of torch's enum.
_UNKNOWN: dict[torch.dtype, int] = {
    torch.int8: 1,
    torch.float64: 7,
    torch.complex32: 8,
    torch.complex64: 9,
    torch.complex128: 10,
}


def require_high_precision(x: torch.Tensor) -> None:
    """What every kernel asks of a tensor that it reads: fp32, fp16 or bf16, and memory to read.

    Raises:
        RuntimeError: another dtype, in TE's words; a tensor without data (on the "meta" device).
    """
    if x.dtype not in _SHORT:
        if x.dtype in _NAMES:
            nvte_error(
                "common/common.h",
                f"Unsupported dtype {_NAMES[x.dtype]}. Expected one of: Float32, Float16, BFloat16.",
            )
        nvte_error("pytorch/csrc/common.h", f"Invalid type ({_UNKNOWN.get(x.dtype, x.dtype)}).")
    if x.device.type != "cpu":
        nvte_error(
            "pytorch/csrc/common.h", f"The tensor is on {x.device}, and has to be on the emulated device."
        )


def torch_dtype(tag: Any) -> torch.dtype:
    """The torch dtype of a TE element type (either enum, or its integer tag).

    Raises:
        RuntimeError: the type has no high-precision torch dtype.
    """
    dtype = _TORCH.get(int(tag))
    if dtype is None:
        nvte_error("pytorch/csrc/common.h", f"Invalid type ({int(tag)}).")
    return dtype


def fp8_format(tag: Any) -> Fp8Format:
    """The FP8 format of a TE element type.

    Raises:
        RuntimeError: the type is not an FP8 type.
    """
    fmt = _FP8.get(int(tag))
    if fmt is None:
        nvte_error("common/common.h", f"Invalid type for 8 bit: {int(tag)}.")
    return fmt


def element_format(tag: Any) -> str:
    """What records call a quantised TE element type: "e4m3", "e5m2", "e2m1".

    Raises:
        RuntimeError: the type is not a quantised type.
    """
    return "e2m1" if int(tag) == _FP4 else fp8_format(tag).name


def short_name(dtype: torch.dtype) -> str:
    """What records call a high-precision dtype: "fp32", "bf16", "fp16"."""
    return _SHORT.get(dtype, str(dtype).removeprefix("torch."))


def te_name(dtype: torch.dtype) -> str:
    """What errors of TE's C++ call a dtype: "Float32", "BFloat16"."""
    return _NAMES.get(dtype, str(dtype).removeprefix("torch."))
