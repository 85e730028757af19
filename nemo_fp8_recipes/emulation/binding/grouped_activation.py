"""Activations of all experts at once, quantised into a grouped tensor.

Follows `group_scaled_swiglu` and `group_scaled_clamped_swiglu` in `pytorch/csrc/extensions/cast.cpp` and
`common/cast/mxfp8/group_scaled_swiglu_mxfp8.cuh` of Transformer Engine: the input of the second linear layer
of experts, computed again in the backward pass. The kernel takes the hardware's approximate tanh; this takes
the exact one. So single codes, and a scale where the largest of its block lies at a power of two, may differ
from the kernel's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.binding.checks import nvte_check
from nemo_fp8_recipes.emulation.binding.dtypes import require_high_precision
from nemo_fp8_recipes.emulation.binding.grouped import group_quantize
from nemo_fp8_recipes.emulation.binding.te_classes import te_classes

__all__ = ["group_scaled_clamped_swiglu", "group_scaled_swiglu"]

SOURCE = "pytorch/csrc/extensions/cast.cpp"
KERNEL = "common/cast/mxfp8/group_scaled_swiglu_mxfp8.cuh"


def group_scaled_swiglu(
    input_2h: Tensor,
    prob: Tensor,
    quantizer: Any,
    num_tensors: int,
    first_dims: Tensor | None = None,
    last_dims: Tensor | None = None,
    tensor_offsets: Tensor | None = None,
) -> Any:
    """silu(first half) * second half * probability of the row, quantised along columns.

    Args:
        input_2h: [rows, 2 * hidden], fp32, fp16 or bf16.
        prob: [rows], of the same dtype.
        quantizer: MXFP8, columnwise alone.
        num_tensors, first_dims, last_dims, tensor_offsets: the members, as in `group_quantize`.

    Returns:
        Grouped tensor [rows, hidden].

    Raises:
        RuntimeError: what TE refuses, in its words.
    """
    _check(input_2h, prob, quantizer)
    _check_kernel(input_2h, quantizer, num_tensors, first_dims, last_dims)
    act, gate = input_2h.detach().to(torch.float32).chunk(2, dim=-1)
    return _quantized(
        _twice_silu(act, 1.0) * gate, prob, input_2h, quantizer, num_tensors, first_dims, tensor_offsets
    )


def group_scaled_clamped_swiglu(
    input_2h: Tensor,
    prob: Tensor,
    quantizer: Any,
    num_tensors: int,
    limit: float,
    alpha: float = 1.702,
    glu_linear_offset: float = 1.0,
    first_dims: Tensor | None = None,
    last_dims: Tensor | None = None,
    tensor_offsets: Tensor | None = None,
) -> Any:
    """The same with both halves clamped, a sigmoid of alpha times the first, and an offset of the second."""
    _check(input_2h, prob, quantizer)
    name = "group_scaled_clamped_swiglu"
    nvte_check(limit > 0.0, SOURCE, f"{name} limit must be positive, got {limit}.")
    nvte_check(
        all(math.isfinite(value) for value in (limit, alpha, glu_linear_offset)),
        SOURCE,
        f"{name} limit, alpha and glu_linear_offset must all be finite.",
    )
    _check_kernel(input_2h, quantizer, num_tensors, first_dims, last_dims)
    act, gate = input_2h.detach().to(torch.float32).chunk(2, dim=-1)
    product = _twice_silu(act.clamp(max=limit), alpha) * (gate.clamp(-limit, limit) + glu_linear_offset)
    return _quantized(product, prob, input_2h, quantizer, num_tensors, first_dims, tensor_offsets)


def _twice_silu(x: Tensor, alpha: float) -> Tensor:
    """2 * x * sigmoid(alpha * x), by a tanh."""
    return x * torch.tanh(0.5 * alpha * x) + x


def _quantized(
    doubled: Tensor,
    prob: Tensor,
    like: Tensor,
    quantizer: Any,
    num_tensors: int,
    first_dims: Tensor | None,
    tensor_offsets: Tensor | None,
) -> Any:
    half = 0.5 * prob.detach().to(torch.float32)[:, None]
    values = (doubled * half).to(like.dtype)
    return group_quantize(values, quantizer, num_tensors, first_dims, tensor_offsets=tensor_offsets)


def _check(x: Tensor, prob: Tensor, quantizer: Any) -> None:
    name = "group_scaled_swiglu"
    nvte_check(x.dim() == 2, SOURCE, f"{name} input must be 2D [N, 2H].")
    nvte_check(x.shape[1] % 2 == 0, SOURCE, f"{name} input last dim must be even (=2H).")
    nvte_check(
        type(quantizer) is te_classes().mxfp8_quantizer,
        SOURCE,
        f"{name} only supports MXFP8 quantizers.",
    )
    nvte_check(x.is_contiguous(), SOURCE, f"{name} input must be contiguous.")
    nvte_check(prob.is_contiguous(), SOURCE, f"{name} prob must be contiguous.")
    nvte_check(
        prob.dim() == 1 and prob.numel() == x.shape[0],
        SOURCE,
        f"{name} prob must be a 1D tensor with exactly N elements.",
    )
    nvte_check(
        prob.dtype == x.dtype,
        SOURCE,
        f"{name} prob must have the same dtype as the input (model dtype).",
    )
    require_high_precision(x)


def _check_kernel(
    x: Tensor, quantizer: Any, num_tensors: int, first_dims: Tensor | None, last_dims: Tensor | None
) -> None:
    rows, hidden = x.shape[0], x.shape[1] // 2
    if 0 in (rows, hidden):
        return
    nvte_check(
        bool(quantizer.columnwise_usage),
        KERNEL,
        "group_scaled_swiglu requires columnwise output data to be allocated.",
    )
    nvte_check(
        not quantizer.rowwise_usage,
        KERNEL,
        "group_scaled_swiglu produces a columnwise output only; rowwise is not implemented.",
    )
    nvte_check(
        last_dims is None,
        KERNEL,
        "group_scaled_swiglu requires all experts to share the same last dim H "
        "(grouped layout SAME_BOTH_DIMS or VARYING_FIRST_DIM).",
    )
    nvte_check(rows % 128 == 0, KERNEL, "group_scaled_swiglu requires N divisible by 128.")
    if not quantizer.optimize_for_gemm:
        return
    nvte_check(
        hidden % 128 == 0,
        KERNEL,
        "group_scaled_swiglu with GEMM-swizzled scales requires the output last dim (H) to be divisible by "
        f"128, got {hidden}.",
    )
    nvte_check(
        num_tensors == 1 or first_dims is not None,
        KERNEL,
        "group_scaled_swiglu with GEMM-swizzled scales and multiple experts requires per-expert first dims "
        "(pass first_dims / split_sections).",
    )
