"""The router of a mixture of experts, backward, and the auxiliary loss.

Follows `pytorch/csrc/extensions/router.cpp` and `common/fused_router/*` of Transformer Engine. The arguments
of the backward functions changed with every release.
"""

# ruff: noqa: ARG001  # signatures are pybind's
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.binding.checks import nvte_check
from nemo_fp8_recipes.emulation.binding.releases import release
from nemo_fp8_recipes.emulation.binding.router import BITMAP
from nemo_fp8_recipes.emulation.binding.router_steps import (
    SOURCE,
    Steps,
    check_score_function,
    normalizes,
    sqrt_softplus,
    sqrt_softplus_backward,
)

__all__ = [
    "fused_moe_aux_loss_bwd",
    "fused_moe_aux_loss_fwd",
    "fused_moe_aux_loss_fwd_graph_safe",
    "fused_score_for_moe_aux_loss_bwd",
    "fused_topk_with_score_function_bwd",
]


def _chosen(routing_map: Tensor, experts: int, routing_map_format: int, dense: bool) -> Tensor:
    """bool [tokens, experts] from any of the forms of a routing map."""
    flat = routing_map.reshape(-1, routing_map.shape[-1])
    if dense:
        return torch.zeros(len(flat), experts, dtype=torch.bool).scatter_(1, flat.long(), True)
    if routing_map_format != BITMAP:
        return flat.bool()
    bits = (flat[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten(1)[:, :experts].bool()


def _topk_backward(
    routing_map: Tensor,
    kept: Tensor,
    grad_probs: Tensor,
    topk: int,
    use_pre_softmax: bool,
    scaling_factor: float | None,
    score_function: str,
    routing_map_format: int,
    dense: bool,
) -> Tensor:
    check_score_function(score_function)
    steps = Steps(grad_probs.dtype)
    experts = grad_probs.shape[-1]
    chosen = _chosen(routing_map.detach(), experts, routing_map_format, dense)
    kept = kept.detach().to(torch.float32).reshape(-1, experts)
    grad = grad_probs.detach().to(torch.float32).reshape(-1, experts)
    grad = steps.store(grad * (1.0 if scaling_factor is None else scaling_factor))
    if score_function == "softmax":
        if not use_pre_softmax:
            return steps.softmax_backward(grad, torch.where(chosen, kept, 0.0), chosen)
        return steps.softmax_backward(torch.where(chosen, grad, 0.0), kept, None)
    output = sqrt_softplus(kept) if score_function == "sqrtsoftplus" else kept
    if topk > 1:
        grad = steps.normalized_backward(grad, output, chosen)
    grad = torch.where(chosen, grad, 0.0)
    if score_function == "sqrtsoftplus":
        return sqrt_softplus_backward(grad, kept, output)
    return steps.sigmoid_backward(grad, output)


def _score_backward(kept: Tensor, grad_scores: Tensor, topk: int, score_function: str) -> Tensor:
    check_score_function(score_function)
    steps = Steps(grad_scores.dtype)
    experts = grad_scores.shape[-1]
    kept = kept.detach().to(torch.float32).reshape(-1, experts)
    grad = grad_scores.detach().to(torch.float32).reshape(-1, experts)
    if score_function == "softmax":
        return steps.softmax_backward(grad, kept, None)
    output = sqrt_softplus(kept) if score_function == "sqrtsoftplus" else kept
    if normalizes(topk):
        grad = steps.normalized_backward(grad, output, None)
    if score_function == "sqrtsoftplus":
        return sqrt_softplus_backward(grad, kept, output)
    return steps.sigmoid_backward(grad, output)


def fused_topk_with_score_function_bwd(*args: Any, **kwargs: Any) -> Tensor | None:
    """Gradient of the logits: returned up to 2.11, written into `grad_logits` since."""
    return _TOPK_BACKWARD[release().name](*args, **kwargs)


def fused_score_for_moe_aux_loss_bwd(*args: Any, **kwargs: Any) -> Tensor | None:
    """Gradient of the logits: returned up to 2.11, written into `grad_logits` since."""
    return _SCORE_BACKWARD[release().name](*args, **kwargs)


def _topk_bwd_2_11(
    num_tokens: int,
    num_experts: int,
    routing_map: Tensor,
    intermediate_output: Tensor,
    grad_probs: Tensor,
    topk: int,
    use_pre_softmax: bool,
    scaling_factor: float | None,
    score_function: str,
) -> Tensor:
    grad = _topk_backward(
        routing_map,
        intermediate_output,
        grad_probs,
        topk,
        use_pre_softmax,
        scaling_factor,
        score_function,
        0,
        False,
    )
    return grad.to(intermediate_output.dtype)


def _topk_bwd_2_14(
    num_tokens: int,
    num_experts: int,
    routing_map: Tensor,
    intermediate_output: Tensor,
    grad_probs: Tensor,
    grad_logits: Tensor,
    topk: int,
    use_pre_softmax: bool,
    scaling_factor: float | None,
    score_function: str,
) -> None:
    _topk_bwd_2_20(
        routing_map,
        intermediate_output,
        grad_probs,
        grad_logits,
        topk,
        use_pre_softmax,
        scaling_factor,
        score_function,
    )


def _topk_bwd_2_17(
    routing_map: Tensor,
    intermediate_output: Tensor,
    grad_probs: Tensor,
    grad_logits: Tensor,
    topk: int,
    use_pre_softmax: bool,
    scaling_factor: float | None,
    score_function: str,
    routing_map_format: int = 0,
) -> None:
    _topk_bwd_2_20(
        routing_map,
        intermediate_output,
        grad_probs,
        grad_logits,
        topk,
        use_pre_softmax,
        scaling_factor,
        score_function,
        False,
        routing_map_format,
    )


def _topk_bwd_2_20(
    routing_map: Tensor,
    intermediate_output: Tensor,
    grad_probs: Tensor,
    grad_logits: Tensor,
    topk: int,
    use_pre_softmax: bool,
    scaling_factor: float | None,
    score_function: str,
    use_dense_indices: bool = False,
    routing_map_format: int = 0,
) -> None:
    nvte_check(
        not use_dense_indices or int(routing_map_format) != BITMAP,
        SOURCE,
        "use_dense_indices cannot be combined with non-default routing_map_format; "
        "dense top-k indices are consumed instead of a routing map.",
    )
    nvte_check(grad_probs.is_contiguous(), SOURCE, "grad_probs must be contiguous")
    nvte_check(grad_logits.is_contiguous(), SOURCE, "grad_logits must be contiguous")
    grad = _topk_backward(
        routing_map,
        intermediate_output,
        grad_probs,
        topk,
        use_pre_softmax,
        scaling_factor,
        score_function,
        int(routing_map_format),
        use_dense_indices,
    )
    grad_logits.copy_(grad.view(grad_logits.shape))


def _score_bwd_2_11(
    num_tokens: int,
    num_experts: int,
    intermediate_output: Tensor,
    grad_scores: Tensor,
    topk: int,
    score_function: str,
) -> Tensor:
    return _score_backward(intermediate_output, grad_scores, topk, score_function).to(
        intermediate_output.dtype
    )


def _score_bwd_2_14(
    num_tokens: int,
    num_experts: int,
    intermediate_output: Tensor,
    grad_scores: Tensor,
    grad_logits: Tensor,
    topk: int,
    score_function: str,
) -> None:
    _score_bwd_2_20(intermediate_output, grad_scores, grad_logits, topk, score_function)


def _score_bwd_2_20(
    intermediate_output: Tensor, grad_scores: Tensor, grad_logits: Tensor, topk: int, score_function: str
) -> None:
    grad = _score_backward(intermediate_output, grad_scores, topk, score_function)
    grad_logits.copy_(grad.view(grad_logits.shape))


_TOPK_BACKWARD: dict[str, Callable[..., Tensor | None]] = {
    "2.11": _topk_bwd_2_11,
    "2.14": _topk_bwd_2_14,
    "2.17": _topk_bwd_2_17,
    "2.20": _topk_bwd_2_20,
}
_SCORE_BACKWARD: dict[str, Callable[..., Tensor | None]] = {
    "2.11": _score_bwd_2_11,
    "2.14": _score_bwd_2_14,
    "2.17": _score_bwd_2_20,
    "2.20": _score_bwd_2_20,
}


def fused_moe_aux_loss_fwd(
    probs: Tensor,
    tokens_per_expert: Tensor,
    total_num_tokens: int,
    num_experts: int,
    num_rows: int,
    num_cols: int,
    topk: int,
    coeff: float,
) -> tuple[Tensor, Tensor]:
    """Load balancing loss and what the backward pass needs.

    The loss is coeff * experts / (topk * tokens^2) * sum over experts of (sum of its probabilities * tokens
    it got), of [rows, columns] probabilities.
    """
    nvte_check(topk > 0, SOURCE, "topk must be greater than 0")
    nvte_check(total_num_tokens > 0, SOURCE, "total_num_tokens must be greater than 0")
    nvte_check(num_experts > 0, SOURCE, "num_experts must be greater than 0")
    nvte_check(
        not release().router_radix or num_cols % num_experts == 0,
        "common/fused_router/fused_moe_aux_loss.cu",
        f"Number of input columns ({num_cols}) must be a multiple of number of experts ({num_experts}).",
    )
    factor = torch.tensor(float(num_experts), dtype=torch.float32) * coeff
    factor = factor / topk / total_num_tokens / total_num_tokens
    wide = torch.float32 if release().router_in_fp32 else torch.float64
    sums = probs.detach().reshape(num_rows, num_cols).to(wide).sum(dim=0)
    loss = (sums * tokens_per_expert.detach().to(wide)).sum() * factor
    if not release().router_radix:
        return loss.to(probs.dtype), factor
    # Since 2.17 the second element is where the kernel sums up.
    return loss.to(probs.dtype), torch.stack((factor, loss.to(torch.float32)))


def fused_moe_aux_loss_fwd_graph_safe(
    probs: Tensor,
    tokens_per_expert: Tensor,
    total_num_tokens: Tensor,
    num_experts: int,
    num_rows: int,
    num_cols: int,
    topk: int,
    coeff: float,
) -> tuple[Tensor, Tensor]:
    """The same with a count of tokens that is on the device."""
    nvte_check(
        total_num_tokens.numel() == 1,
        SOURCE,
        f"total_num_tokens must contain exactly one element; got {total_num_tokens.numel()}",
    )
    nvte_check(
        total_num_tokens.dtype == torch.int64,
        SOURCE,
        f"total_num_tokens must be int64; got {total_num_tokens.dtype}",
    )
    return fused_moe_aux_loss_fwd(
        probs, tokens_per_expert, int(total_num_tokens), num_experts, num_rows, num_cols, topk, coeff
    )


def fused_moe_aux_loss_bwd(
    Const_buf: Tensor, tokens_per_expert: Tensor, num_rows: int, num_cols: int, grad_aux_loss: Tensor
) -> Tensor:
    """Gradient of the probabilities, [rows, columns]: the same for every row."""
    wide = torch.float32 if release().router_in_fp32 else torch.float64
    factor = Const_buf.reshape(-1)[0].to(wide)
    row = factor * tokens_per_expert.detach().to(wide) * grad_aux_loss.detach().to(wide)
    return row.to(grad_aux_loss.dtype).reshape(1, num_cols).repeat(num_rows, 1)
