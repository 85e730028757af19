"""Dropout with a mask of bits.

Follows `pytorch/csrc/extensions/dropout.cpp` and `common/dropout/dropout.cu` of Transformer Engine: a byte of
random bits below floor(256 p) drops an element, so that p is rounded down to a multiple of 1/256; the factor
of what stays is that of the unrounded p. Elements are 16-bit floats; FP8 with one scale is read too. The
random bits come from torch's default generator, as the device's generator gives them on a GPU; they are
others.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.binding import operands
from nemo_fp8_recipes.emulation.binding.checks import nvte_check
from nemo_fp8_recipes.emulation.binding.dtypes import te_name
from nemo_fp8_recipes.emulation.binding.te_classes import scaling_mode, te_classes

__all__ = ["dropout_bwd", "dropout_fwd"]

SOURCE = "common/dropout/dropout.cu"
_HALF = (torch.float16, torch.bfloat16)


def dropout_fwd(input: Any, dropout_probability: float, out: Tensor | None = None) -> list[Tensor]:
    """[output, mask]: mask uint8 [elements / 8], the lowest bit first, 1 for what stays."""
    classes = te_classes()
    probability = _fp32(dropout_probability)
    if isinstance(input, classes.float8_storage):
        values, dtype, shape = operands.values(input, columnwise=False), input.dtype, tuple(input._data.shape)
    elif isinstance(input, classes.quantized_storage):
        nvte_check(
            False,
            SOURCE,
            "Input tensor must be FP16/BF16 tensor or tensor-scaled FP8 tensor, but scaling mode is "
            f"{scaling_mode(input)}.",
        )
    else:
        values, dtype, shape = input.detach(), input.dtype, tuple(input.shape)
    if out is None:
        out = torch.empty(shape, dtype=dtype)
    _check_half(out, "Output")
    _check(values, out, "Input", "output", probability)
    if not isinstance(input, classes.float8_storage):
        _check_half(values, "Input")
        _check_same(values, out, "Input", "output")
    threshold = math.floor(probability * 256)
    keep = torch.randint(0, 256, (values.numel(),), dtype=torch.uint8) >= threshold
    _apply(values, keep, out, probability)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    mask = (keep.view(-1, 8).to(torch.uint8) * weights).sum(dim=1, dtype=torch.uint8)
    return [out, mask]


def dropout_bwd(
    grad_output: Tensor, mask: Tensor, dropout_probability: float, grad_input: Tensor | None = None
) -> Tensor:
    """Gradient of `dropout_fwd` under its mask."""
    if grad_input is None:
        grad_input = torch.empty_like(grad_output)
    grad = grad_output.detach()
    probability = _fp32(dropout_probability)
    _check_half(grad, "Grad output")
    _check_same(grad, grad_input, "Grad output", "grad input")
    _check(grad, grad_input, "Grad output", "grad input", probability)
    nvte_check(
        mask.numel() * 8 == grad.numel(),
        SOURCE,
        f"Mask tensor must have {grad.numel()} bits, but found dtype={te_name(mask.dtype)} and shape="
        f"{tuple(mask.shape)}.",
    )
    bits = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    _apply(grad, (mask.view(-1, 1) & bits).ne(0).view(-1), grad_input, probability)
    return grad_input


def _fp32(probability: float) -> float:
    """The probability as the binding takes it: an fp32 number."""
    return float(np.float32(probability))


def _check_half(x: Tensor, name: str) -> None:
    nvte_check(
        x.dtype in _HALF,
        SOURCE,
        f"{name} tensor must be FP16/BF16 tensor, but dtype is {te_name(x.dtype)}.",
    )


def _check_same(x: Tensor, out: Tensor, name: str, out_name: str) -> None:
    nvte_check(
        x.dtype == out.dtype,
        SOURCE,
        f"{name} tensor (dtype={te_name(x.dtype)}) and {out_name} tensor "
        f"(dtype={te_name(out.dtype)}) do not match.",
    )


def _check(x: Tensor, out: Tensor, name: str, out_name: str, probability: float) -> None:
    nvte_check(
        x.numel() % 16 == 0,
        SOURCE,
        f"{name} tensor number of elements must be divisible by 16, but shape is {tuple(x.shape)}.",
    )
    nvte_check(
        x.numel() == out.numel(),
        SOURCE,
        f"{name} tensor (shape={tuple(x.shape)}) and {out_name} tensor (shape={tuple(out.shape)}) "
        "do not match.",
    )
    nvte_check(0 <= probability < 1, SOURCE, f"Invalid dropout probability ({probability}).")


def _apply(x: Tensor, keep: Tensor, out: Tensor, probability: float) -> None:
    """0 or x / (1 - p), one rounding; what is dropped is 0 even where it was NaN."""
    factor = 1.0 / (1.0 - torch.tensor(probability, dtype=torch.float32))
    kept = torch.where(keep, x.to(torch.float32).reshape(-1), 0.0)
    out.detach().copy_((kept * factor).view(out.shape))
