"""LayerNorm and RMSNorm, forward and backward, with quantised output.

Follows `pytorch/csrc/extensions/normalization.cpp`,
`common/normalization/layernorm/ln_{fwd,bwd_semifinal_cuda}_kernel` and `common/normalization/rmsnorm/*` of
Transformer Engine. Statistics and affine part are computed in fp32. What is cast: delayed scaling casts the
fp32 result in the same kernel; every other format first rounds it to the output dtype and takes amax and
codes from that. Zero-centred gamma stands for gamma + 1.
"""

# ruff: noqa: ARG001  # `sm_margin`: no multiprocessors to leave free
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.binding.dtypes import require_high_precision, torch_dtype
from nemo_fp8_recipes.emulation.binding.quantize import is_delayed, quantize_as

__all__ = ["layernorm_bwd", "layernorm_fwd", "rmsnorm_bwd", "rmsnorm_bwd_add", "rmsnorm_fwd"]


def layernorm_fwd(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    ln_out: Any,
    quantizer: Any,
    otype: Any,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> list[Any]:
    """Returns [output, mean, reciprocal standard deviation]; statistics are fp32, one element a row."""
    x = _rows(input)
    mean = x.mean(dim=1)
    centred = x - mean[:, None]
    rsigma = torch.rsqrt(centred.square().mean(dim=1) + eps)
    normed = centred.mul_(rsigma[:, None]).mul_(_gamma(weight, zero_centered_gamma))
    if bias is not None:
        normed.add_(bias.detach().to(torch.float32))
    return [_emit(normed.view(input.shape), ln_out, quantizer, otype, "layernorm_fwd"), mean, rsigma]


def layernorm_bwd(
    dz: Tensor,
    x: Tensor,
    mu: Tensor,
    rsigma: Tensor,
    gamma: Tensor,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> list[Tensor]:
    """Returns [dx, dgamma, dbeta]."""
    grad = _rows(dz)
    rs = rsigma[:, None]
    normed = (_rows(x) - mu[:, None]).mul_(rs)
    weighted = grad * _gamma(gamma, zero_centered_gamma)
    projection = (weighted * normed).mean(dim=1, keepdim=True)
    dx = rs * (weighted - weighted.mean(dim=1, keepdim=True) - normed * projection)
    dgamma = (grad * normed).sum(dim=0).to(gamma.dtype)
    dbeta = grad.sum(dim=0).to(gamma.dtype)
    return [dx.view(x.shape).to(x.dtype), dgamma, dbeta]


def rmsnorm_fwd(
    input: Tensor,
    weight: Tensor,
    eps: float,
    ln_out: Any,
    quantizer: Any,
    otype: Any,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> list[Any]:
    """Returns [output, None, reciprocal root mean square]."""
    x = _rows(input)
    rsigma = torch.rsqrt(x.square().mean(dim=1) + eps)
    normed = (x * rsigma[:, None]).mul_(_gamma(weight, zero_centered_gamma))
    return [_emit(normed.view(input.shape), ln_out, quantizer, otype, "rmsnorm_fwd"), None, rsigma]


def rmsnorm_bwd(
    dz: Tensor,
    x: Tensor,
    rsigma: Tensor,
    gamma: Tensor,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> list[Tensor]:
    """Returns [dx, dgamma]."""
    dx, dgamma = _rmsnorm_bwd(dz, x, rsigma, gamma, zero_centered_gamma)
    return [dx.to(x.dtype), dgamma]


def rmsnorm_bwd_add(
    dz: Tensor,
    x: Tensor,
    add: Tensor,
    rsigma: Tensor,
    gamma: Tensor,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> list[Tensor]:
    """`rmsnorm_bwd` with `add` (the gradient of a residual branch) added to dx before it is rounded."""
    dx, dgamma = _rmsnorm_bwd(dz, x, rsigma, gamma, zero_centered_gamma)
    return [dx.add_(add.detach().to(torch.float32).view(dx.shape)).to(x.dtype), dgamma]


def _rmsnorm_bwd(
    dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    grad = _rows(dz)
    rs = rsigma[:, None]
    normed = _rows(x) * rs
    weighted = grad * _gamma(gamma, zero_centered)
    dx = rs * (weighted - normed * (weighted * normed).mean(dim=1, keepdim=True))
    return dx.view(x.shape), (grad * normed).sum(dim=0).to(gamma.dtype)


def _rows(x: Tensor) -> Tensor:
    """fp32 [rows, hidden]."""
    require_high_precision(x)
    return x.detach().reshape(-1, x.shape[-1]).to(torch.float32)


def _gamma(weight: Tensor, zero_centered: bool) -> Tensor:
    gamma = weight.detach().to(torch.float32)
    return gamma + 1.0 if zero_centered else gamma


def _emit(result: Tensor, out: Any, quantizer: Any, otype: Any, caller: str) -> Any:
    dtype = torch_dtype(otype)
    if quantizer is None:
        if out is None:
            return result.to(dtype)
        out.detach().copy_(result.view(out.shape))
        return out
    source = result if is_delayed(quantizer) else result.to(dtype)
    return quantize_as(source, quantizer, dtype, caller=caller, output=out)
