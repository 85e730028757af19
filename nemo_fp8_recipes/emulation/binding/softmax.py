"""Scaled softmax of attention scores, plain, masked and causal.

Follows `pytorch/csrc/extensions/softmax.cpp` and `common/fused_softmax/*.cu` of Transformer Engine. Computed
in fp32, stored in the input's dtype (fp16 or bf16 only, as in C++). The forward kernels take the scale factor
in the input's dtype, the backward kernels in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.binding.checks import nvte_check

__all__ = [
    "scaled_aligned_causal_masked_softmax_backward",
    "scaled_aligned_causal_masked_softmax_forward",
    "scaled_masked_softmax_backward",
    "scaled_masked_softmax_forward",
    "scaled_softmax_backward",
    "scaled_softmax_forward",
    "scaled_upper_triang_masked_softmax_backward",
    "scaled_upper_triang_masked_softmax_forward",
]

SOURCE = "pytorch/csrc/extensions/softmax.cpp"

# What the kernels put in place of a masked score. A row with nothing else gives zeros.
MASKED = -10000.0


def scaled_softmax_forward(input: Tensor, scale_factor: float) -> Tensor:
    """softmax(scale * input) over the last dimension; input [batch, heads, queries, keys]."""
    _check(input, dims=4)
    _check_keys(input, min_queries=2)
    return _softmax(_scaled(input, scale_factor), input.dtype)


def scaled_masked_softmax_forward(input: Tensor, mask: Tensor, scale_factor: float) -> Tensor:
    """Softmax with a mask [batch or 1, 1, queries, keys]; 1 is masked. A row with every key masked gives
    zeros.
    """
    _check(input, dims=4)
    _check_keys(input, min_queries=2)
    nvte_check(mask.dim() == 4, SOURCE, "expected 4D tensor")
    nvte_check(
        mask.shape[0] in (1, input.shape[0])
        and mask.shape[1] == 1
        and tuple(mask.shape[2:]) == tuple(input.shape[2:]),
        SOURCE,
        f"mask of shape {tuple(mask.shape)} does not fit scores of shape {tuple(input.shape)}",
    )
    scores = _scaled(input, scale_factor).masked_fill_(mask == 1, MASKED)
    largest = scores.amax(dim=-1, keepdim=True)
    result = torch.softmax(scores, dim=-1)
    return torch.where(largest == MASKED, 0.0, result).to(input.dtype)


def scaled_upper_triang_masked_softmax_forward(input: Tensor, scale_factor: float) -> Tensor:
    """Causal softmax of square scores [attention batches, sequence, sequence]."""
    _check(input, dims=3)
    nvte_check(input.shape[1] <= 16384, SOURCE, "Sequence length must be 16384 or less")
    scores = _scaled(input, scale_factor)
    return _softmax(scores.masked_fill_(_future(input), float("-inf")), input.dtype)


def scaled_aligned_causal_masked_softmax_forward(input: Tensor, scale_factor: float) -> Tensor:
    """Causal softmax aligned to the bottom right corner; input [batch, heads, queries, keys]. Rows that see
    no key give zeros.
    """
    _check(input, dims=4)
    _check_keys(input, min_queries=1)
    future = _future(input)
    scores = _scaled(input, scale_factor).masked_fill_(future, MASKED)
    return torch.softmax(scores, dim=-1).masked_fill_(future, 0.0).to(input.dtype)


def scaled_softmax_backward(output_grad_: Tensor, softmax_results_: Tensor, scale_factor: float) -> Tensor:
    """Gradient of the scores: scale * y * (dy - sum(dy * y))."""
    _check(output_grad_, dims=4)
    _check(softmax_results_, dims=4)
    return _backward(output_grad_, softmax_results_, scale_factor)


def scaled_masked_softmax_backward(
    output_grad_: Tensor, softmax_results_: Tensor, scale_factor: float
) -> Tensor:
    return scaled_softmax_backward(output_grad_, softmax_results_, scale_factor)


def scaled_upper_triang_masked_softmax_backward(
    output_grads_: Tensor, softmax_results_: Tensor, scale_factor: float
) -> Tensor:
    _check(output_grads_, dims=3)
    _check(softmax_results_, dims=3)
    return _backward(output_grads_, softmax_results_, scale_factor)


def scaled_aligned_causal_masked_softmax_backward(
    output_grad_: Tensor, softmax_results_: Tensor, scale_factor: float
) -> Tensor:
    return scaled_softmax_backward(output_grad_, softmax_results_, scale_factor)


def _scaled(scores: Tensor, scale: float) -> Tensor:
    rounded = torch.tensor(scale, dtype=scores.dtype).to(torch.float32)
    return scores.detach().to(torch.float32) * rounded


def _softmax(scores: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.softmax(scores, dim=-1).to(dtype)


def _backward(grad: Tensor, result: Tensor, scale: float) -> Tensor:
    y = result.detach().to(torch.float32)
    weighted = grad.detach().to(torch.float32) * y
    return (weighted - y * weighted.sum(dim=-1, keepdim=True)).mul_(scale).to(grad.dtype)


def _future(scores: Tensor) -> Tensor:
    """True where the key comes after the query, both counted from the end; [queries, keys]."""
    queries, keys = scores.shape[-2:]
    return torch.ones(queries, keys, dtype=torch.bool, device=scores.device).triu_(keys - queries + 1)


def _check(tensor: Tensor, *, dims: int) -> None:
    nvte_check(tensor.dim() == dims, SOURCE, f"expected {dims}D tensor")
    nvte_check(tensor.dtype in (torch.float16, torch.bfloat16), SOURCE, "Only fp16 and bf16 are supported")


def _check_keys(scores: Tensor, *, min_queries: int) -> None:
    queries, keys = scores.shape[-2:]
    nvte_check(keys <= 16384, SOURCE, "Key sequence length must be 16384 or less")
    nvte_check(keys % 8 == 0, SOURCE, "Key sequence length must be divisible by 8")
    nvte_check(queries >= min_queries, SOURCE, f"Query sequence length must be at least {min_queries}")
