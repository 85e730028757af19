"""Activations, their gated variants and their gradients, with quantised output.

Follows `pytorch/csrc/extensions/activation.cpp`, `extensions/bias.cpp` (`dbias_*`), `common/util/math.h` and
`common/activation/*` of Transformer Engine. Everything is computed in fp32. What is cast: delayed scaling
casts the fp32 result; every other format first rounds it to the input's dtype. The amax, where a scale needs
it, is that of the fp32 result (`FUSED_ACTIVATION_AMAX_FP8`, `_NVFP4`), unlike a norm's. Gated variants split
the last dimension: act(first half) * second half.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.binding.checks import nvte_check
from nemo_fp8_recipes.emulation.binding.dtypes import require_high_precision
from nemo_fp8_recipes.emulation.binding.quantize import is_delayed, is_mxfp8, quantize_as

__all__ = [
    "GENERATED",
    "clamped_dswiglu",
    "clamped_halves",
    "clamped_swiglu",
    "dsituglu",
    "gelu_backward",
    "gelu_forward",
    "silu_halves",
    "situ_halves",
    "situglu",
    "squared_relu",
]

Unary = Callable[[Tensor], Tensor]

_SQRT_2_OVER_PI = 0.79788456
_GELU_CUBIC = 0.03567741


def gelu_forward(x: Tensor) -> Tensor:
    """GELU in its tanh approximation; fp32."""
    return x * (0.5 + 0.5 * torch.tanh(x * (_SQRT_2_OVER_PI + _GELU_CUBIC * x * x)))


def gelu_backward(x: Tensor) -> Tensor:
    """Derivative of `gelu_forward`; fp32."""
    tanh = torch.tanh(_SQRT_2_OVER_PI * x * (1.0 + 0.044715 * x * x))
    return 0.5 * x * ((1.0 - tanh * tanh) * (_SQRT_2_OVER_PI + 0.1070322243 * x * x)) + 0.5 * (1.0 + tanh)


def _sigmoid_backward(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1.0 - s)


def _scaled_silu(alpha: float) -> tuple[Unary, Unary]:
    """x * sigmoid(alpha * x) and its derivative: SiLU for 1, quick GELU for 1.702."""
    return (
        lambda x: x * torch.sigmoid(alpha * x),
        lambda x: alpha * x * _sigmoid_backward(alpha * x) + torch.sigmoid(alpha * x),
    )


def _relu(x: Tensor) -> Tensor:
    """max(x, 0) as CUDA's fmaxf has it: 0 for NaN."""
    return torch.fmax(x, x.new_zeros(()))


_FUNCTIONS: dict[str, tuple[Unary, Unary]] = {
    "gelu": (gelu_forward, gelu_backward),
    "qgelu": _scaled_silu(1.702),
    "silu": _scaled_silu(1.0),
    "relu": (_relu, lambda x: (x > 0.0).to(torch.float32)),
    "srelu": (lambda x: _relu(x).square(), lambda x: _relu(2.0 * x)),
    "sigmoid": (torch.sigmoid, _sigmoid_backward),
}
"""Activation -> (function, derivative)."""

_GATED: dict[str, str] = {
    "geglu": "gelu",
    "qgeglu": "qgelu",
    "swiglu": "silu",
    "reglu": "relu",
    "sreglu": "srelu",
    "glu": "sigmoid",
}
"""Gated variant -> activation of its first half."""


def _emit(result: Tensor, dtype: torch.dtype, quantizer: Any, caller: str) -> Any:
    """Output of an activation kernel: fp32 result -> tensor of `dtype`, quantised where asked for."""
    if quantizer is None:
        return result.to(dtype)
    if is_delayed(quantizer):
        return quantize_as(result, quantizer, dtype, caller=caller)
    return quantize_as(result.to(dtype), quantizer, dtype, caller=caller, unrounded=result)


def _fp32(x: Tensor) -> Tensor:
    require_high_precision(x)
    return x.detach().to(torch.float32)


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 halves of the last dimension."""
    first, second = _fp32(x).chunk(2, dim=-1)
    return first, second


def _forward(name: str, function: Unary) -> Callable[..., Any]:
    def activation(input: Tensor, quantizer: Any) -> Any:
        return _emit(function(_fp32(input)), input.dtype, quantizer, name)

    return activation


def _backward(name: str, derivative: Unary) -> Callable[..., Any]:
    def activation_grad(grad: Tensor, fwd_input: Tensor, quantizer: Any) -> Any:
        x = _fp32(fwd_input)
        result = derivative(x).mul_(_fp32(grad).view(x.shape))
        return _emit(result, grad.dtype, quantizer, name)

    return activation_grad


def _gated_forward(name: str, function: Unary) -> Callable[..., Any]:
    def activation(input: Tensor, quantizer: Any) -> Any:
        gate, value = _fp32(input).chunk(2, dim=-1)
        return _emit(function(gate) * value, input.dtype, quantizer, name)

    return activation


def _gated_backward(name: str, function: Unary, derivative: Unary) -> Callable[..., Any]:
    def activation_grad(grad: Tensor, fwd_input: Tensor, quantizer: Any) -> Any:
        gate, value = _fp32(fwd_input).chunk(2, dim=-1)
        upstream = _fp32(grad).view(gate.shape)
        result = torch.cat((derivative(gate) * upstream * value, function(gate) * upstream), dim=-1)
        return _emit(result, grad.dtype, quantizer, name)

    return activation_grad


def _dbias_backward(name: str, derivative: Unary) -> Callable[..., Any]:
    def activation_grad_and_bias_grad(grad: Tensor, fwd_input: Tensor, quantizer: Any) -> list[Any]:
        x = _fp32(fwd_input)
        result = derivative(x).mul_(_fp32(grad).view(x.shape))
        one_kernel = is_delayed(quantizer) or is_mxfp8(quantizer)
        summed = result if one_kernel else result.to(grad.dtype).to(torch.float32)
        bias_grad = summed.reshape(-1, summed.shape[-1]).sum(dim=0).to(grad.dtype)
        return [bias_grad, _emit(result, grad.dtype, quantizer, name)]

    return activation_grad_and_bias_grad


@dataclass(frozen=True)
class Halves:
    """A gated activation and its derivatives at one input; fp32, all of the shape of a half.

    Attributes:
        act: activation of the first half.
        gate: what it is multiplied with, from the second half.
        d_act, d_gate: the derivatives of these two.
    """

    act: Tensor
    gate: Tensor
    d_act: Tensor
    d_gate: Tensor | float


def silu_halves(first: Tensor, second: Tensor) -> Halves:
    """SwiGLU."""
    function, derivative = _FUNCTIONS["silu"]
    return Halves(function(first), second, derivative(first), 1.0)


def clamped_halves(
    first: Tensor, second: Tensor, limit: float, alpha: float, glu_linear_offset: float
) -> Halves:
    """SwiGLU of GPT-OSS: both halves clamped, the linear one shifted; no gradient where one was clamped. NaN
    is clamped too, as CUDA's fminf and fmaxf have it.
    """
    function, derivative = _scaled_silu(alpha)
    bound = first.new_tensor(limit)
    clamped = torch.fmin(first, bound)
    return Halves(
        function(clamped),
        torch.fmin(torch.fmax(second, -bound), bound) + glu_linear_offset,
        torch.where(first <= limit, derivative(clamped), 0.0),
        (second.abs() <= limit).to(torch.float32),
    )


def situ_halves(first: Tensor, second: Tensor, beta1: float, beta2: float) -> Halves:
    """SiTU-GLU: both halves saturate smoothly, beta1 tanh(x / beta1) sigmoid(x) and beta2 tanh(x / beta2).

    Raises:
        RuntimeError: a beta that is not finite and positive.
    """
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        nvte_check(
            beta > 0.0 and math.isfinite(beta),
            "common/activation/swiglu.cu",
            f"{name} must be finite and positive.",
        )
    tanh, sigmoid = torch.tanh(first / beta1), torch.sigmoid(first)
    tanh_of_gate = torch.tanh(second / beta2)
    return Halves(
        beta1 * tanh * sigmoid,
        beta2 * tanh_of_gate,
        (1.0 - tanh * tanh) * sigmoid + beta1 * tanh * sigmoid * (1.0 - sigmoid),
        1.0 - tanh_of_gate * tanh_of_gate,
    )


def squared_relu(x: Tensor) -> tuple[Tensor, Tensor]:
    """Squared ReLU and its derivative; fp32."""
    function, derivative = _FUNCTIONS["srelu"]
    return function(x), derivative(x)


def _gated_gradient(grad: Tensor, halves: Halves) -> Tensor:
    upstream = _fp32(grad).view(halves.act.shape)
    d_first = halves.d_act * upstream * halves.gate
    return torch.cat((d_first, halves.d_gate * upstream * halves.act), dim=-1)


def clamped_swiglu(
    input: Tensor,
    quantizer: Any,
    limit: float = 7.0,
    alpha: float = 1.702,
    glu_linear_offset: float = 1.0,
) -> Any:
    halves = clamped_halves(*_split(input), limit, alpha, glu_linear_offset)
    return _emit(halves.act * halves.gate, input.dtype, quantizer, "clamped_swiglu")


def clamped_dswiglu(
    grad: Tensor,
    fwd_input: Tensor,
    quantizer: Any,
    limit: float = 7.0,
    alpha: float = 1.702,
    glu_linear_offset: float = 1.0,
) -> Any:
    halves = clamped_halves(*_split(fwd_input), limit, alpha, glu_linear_offset)
    return _emit(_gated_gradient(grad, halves), grad.dtype, quantizer, "clamped_dswiglu")


def situglu(input: Tensor, quantizer: Any, beta1: float = 4.0, beta2: float = 25.0) -> Any:
    halves = situ_halves(*_split(input), beta1, beta2)
    return _emit(halves.act * halves.gate, input.dtype, quantizer, "situglu")


def dsituglu(grad: Tensor, fwd_input: Tensor, quantizer: Any, beta1: float = 4.0, beta2: float = 25.0) -> Any:
    halves = situ_halves(*_split(fwd_input), beta1, beta2)
    return _emit(_gated_gradient(grad, halves), fwd_input.dtype, quantizer, "dsituglu")


def _binding_functions() -> dict[str, Callable[..., Any]]:
    made: dict[str, Callable[..., Any]] = {}
    for name in ("gelu", "qgelu", "silu", "relu", "srelu"):
        function, derivative = _FUNCTIONS[name]
        made[name] = _forward(name, function)
        made[f"d{name}"] = _backward(f"d{name}", derivative)
        made[f"dbias_d{name}"] = _dbias_backward(f"dbias_d{name}", derivative)
    for name, activation in _GATED.items():
        function, derivative = _FUNCTIONS[activation]
        made[name] = _gated_forward(name, function)
        made[f"d{name}"] = _gated_backward(f"d{name}", function, derivative)
    return made


GENERATED = _binding_functions()
"""The binding functions that differ in their activation only, by name."""
