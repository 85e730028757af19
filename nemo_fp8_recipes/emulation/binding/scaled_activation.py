"""Activations times one factor a row, such as a router's probability of each token.

Follows `common/activation/scaled_*.cu` and `pytorch/csrc/extensions/activation.cpp` of Transformer Engine.
Everything is computed in fp32 and rounded once; what a quantizer casts is that rounded result. With
`glu_interleave_size` the two halves of a gated activation come in turns of so many columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.binding.activation import (
    Halves,
    clamped_halves,
    silu_halves,
    situ_halves,
    squared_relu,
)
from nemo_fp8_recipes.emulation.binding.checks import nvte_check
from nemo_fp8_recipes.emulation.binding.dtypes import require_high_precision
from nemo_fp8_recipes.emulation.binding.quantize import quantize_as

__all__ = [
    "scaled_clamped_dswiglu",
    "scaled_clamped_swiglu",
    "scaled_dsituglu",
    "scaled_dsrelu",
    "scaled_dswiglu",
    "scaled_situglu",
    "scaled_srelu",
    "scaled_swiglu",
]

SOURCE = "pytorch/csrc/extensions/activation.cpp"
KERNELS = "common/activation/scaled_activation.cu"

Gated = Callable[[Tensor, Tensor], Halves]


def _rows(x: Tensor) -> Tensor:
    """fp32 [rows, columns]."""
    require_high_precision(x)
    nvte_check(x.dim() >= 1, SOURCE, "scaled activation input must have at least 1 dimension")
    return x.detach().to(torch.float32).reshape(-1, x.shape[-1])


def _factors(act_scales: Tensor, rows: int) -> Tensor:
    """fp32 [rows, 1]."""
    require_high_precision(act_scales)
    nvte_check(act_scales.numel() == rows, SOURCE, "scaled activation expects one scale per input row")
    return act_scales.detach().to(torch.float32).reshape(-1, 1)


def _check_interleaving(hidden: int, turn: int, name: str) -> None:
    nvte_check(turn >= 0, KERNELS, f"{name}: glu_interleave_size must be non-negative.")
    nvte_check(turn % 32 == 0, KERNELS, f"{name}: nonzero glu_interleave_size must be a multiple of 32.")
    nvte_check(
        turn == 0 or hidden % turn == 0,
        KERNELS,
        f"{name}: output last dimension must be divisible by glu_interleave_size.",
    )


def _halves(x: Tensor, turn: int, name: str) -> tuple[Tensor, Tensor]:
    """The halves [rows, hidden] of [rows, 2 * hidden]."""
    rows, columns = x.shape
    nvte_check(columns % 2 == 0, SOURCE, "scaled activation input width is not compatible with activation")
    _check_interleaving(columns // 2, turn, name)
    if turn:
        x = x.view(rows, -1, 2, turn).transpose(1, 2).reshape(rows, columns)
    first, second = x.chunk(2, dim=-1)
    return first, second


def _interleaved(x: Tensor, turn: int) -> Tensor:
    """The inverse of `_halves`, of the halves side by side."""
    rows, columns = x.shape
    return x.view(rows, 2, -1, turn).transpose(1, 2).reshape(rows, columns) if turn else x


def _emit(result: Tensor, dtype: torch.dtype, quantizer: Any, caller: str) -> Any:
    rounded = result.to(dtype)
    return rounded if quantizer is None else quantize_as(rounded, quantizer, dtype, caller=caller)


def _forward(input: Tensor, act_scales: Tensor, quantizer: Any, turn: int, gated: Gated, name: str) -> Any:
    halves = gated(*_halves(_rows(input), turn, name))
    result = (halves.act * halves.gate).mul_(_factors(act_scales, halves.act.shape[0]))
    return _emit(result.view(*input.shape[:-1], -1), input.dtype, quantizer, name)


def _backward(
    grad: Tensor,
    input: Tensor,
    act_scales: Tensor,
    quantizer: Any,
    turn: int,
    with_scales: bool,
    gated: Gated,
    name: str,
) -> tuple[Any, Tensor | None]:
    halves = gated(*_halves(_rows(input), turn, name))
    upstream = _rows(grad)
    nvte_check(
        upstream.shape == halves.act.shape, KERNELS, f"{name}: gated backward dimensions are inconsistent."
    )
    scaled = upstream * _factors(act_scales, upstream.shape[0])
    d_first = scaled * (halves.d_act * halves.gate)
    d_second = scaled * (halves.act * halves.d_gate)
    result = _interleaved(torch.cat((d_first, d_second), dim=-1), turn).view(input.shape)
    d_scales = _scale_gradient(upstream, halves.act * halves.gate, act_scales) if with_scales else None
    return _emit(result, input.dtype, quantizer, name), d_scales


def _scale_gradient(upstream: Tensor, unscaled: Tensor, act_scales: Tensor) -> Tensor:
    return (upstream * unscaled).sum(dim=-1).to(act_scales.dtype).view(act_scales.shape)


def scaled_swiglu(input: Tensor, act_scales: Tensor, quantizer: Any, glu_interleave_size: int = 0) -> Any:
    return _forward(input, act_scales, quantizer, glu_interleave_size, silu_halves, "nvte_scaled_swiglu")


def scaled_dswiglu(
    grad: Tensor,
    fwd_input: Tensor,
    act_scales: Tensor,
    quantizer: Any,
    glu_interleave_size: int = 0,
    compute_scale_grad: bool = True,
) -> tuple[Any, Tensor | None]:
    return _backward(
        grad,
        fwd_input,
        act_scales,
        quantizer,
        glu_interleave_size,
        compute_scale_grad,
        silu_halves,
        "nvte_scaled_dswiglu",
    )


def scaled_situglu(
    input: Tensor,
    act_scales: Tensor,
    quantizer: Any,
    beta1: float = 4.0,
    beta2: float = 25.0,
    glu_interleave_size: int = 0,
) -> Any:
    return _forward(
        input,
        act_scales,
        quantizer,
        glu_interleave_size,
        lambda first, second: situ_halves(first, second, beta1, beta2),
        "nvte_scaled_situglu",
    )


def scaled_dsituglu(
    grad: Tensor,
    fwd_input: Tensor,
    act_scales: Tensor,
    quantizer: Any,
    beta1: float = 4.0,
    beta2: float = 25.0,
    glu_interleave_size: int = 0,
    compute_scale_grad: bool = True,
) -> tuple[Any, Tensor | None]:
    return _backward(
        grad,
        fwd_input,
        act_scales,
        quantizer,
        glu_interleave_size,
        compute_scale_grad,
        lambda first, second: situ_halves(first, second, beta1, beta2),
        "nvte_scaled_dsituglu",
    )


def scaled_clamped_swiglu(
    input: Tensor,
    act_scales: Tensor,
    quantizer: Any,
    limit: float = 7.0,
    alpha: float = 1.702,
    glu_linear_offset: float = 1.0,
    glu_interleave_size: int = 0,
) -> Any:
    return _forward(
        input,
        act_scales,
        quantizer,
        glu_interleave_size,
        lambda first, second: clamped_halves(first, second, limit, alpha, glu_linear_offset),
        "nvte_scaled_clamped_swiglu",
    )


def scaled_clamped_dswiglu(
    grad: Tensor,
    fwd_input: Tensor,
    act_scales: Tensor,
    quantizer: Any,
    limit: float = 7.0,
    alpha: float = 1.702,
    glu_linear_offset: float = 1.0,
    glu_interleave_size: int = 0,
    compute_scale_grad: bool = True,
) -> tuple[Any, Tensor | None]:
    return _backward(
        grad,
        fwd_input,
        act_scales,
        quantizer,
        glu_interleave_size,
        compute_scale_grad,
        lambda first, second: clamped_halves(first, second, limit, alpha, glu_linear_offset),
        "nvte_scaled_clamped_dswiglu",
    )


def scaled_srelu(input: Tensor, act_scales: Tensor, quantizer: Any) -> Any:
    act, _ = squared_relu(_rows(input))
    result = act * _factors(act_scales, act.shape[0])
    return _emit(result.view(input.shape), input.dtype, quantizer, "nvte_scaled_srelu")


def scaled_dsrelu(
    grad: Tensor, fwd_input: Tensor, act_scales: Tensor, quantizer: Any, compute_scale_grad: bool = True
) -> tuple[Any, Tensor | None]:
    act, d_act = squared_relu(_rows(fwd_input))
    upstream = _rows(grad)
    nvte_check(
        upstream.shape == act.shape,
        KERNELS,
        "nvte_scaled_dsrelu: unary backward dimensions are inconsistent.",
    )
    result = upstream * _factors(act_scales, act.shape[0]) * d_act
    d_scales = _scale_gradient(upstream, act, act_scales) if compute_scale_grad else None
    return _emit(result.view(fwd_input.shape), fwd_input.dtype, quantizer, "nvte_scaled_dsrelu"), d_scales
