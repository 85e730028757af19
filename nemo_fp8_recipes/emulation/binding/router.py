"""The router of a mixture of experts, forward: scores, and the experts of each token.

Follows `pytorch/csrc/extensions/router.cpp` and `common/fused_router/*` of Transformer Engine: the functions
behind `transformer_engine.pytorch.router`. `router_steps.py` has the arithmetic, `router_topk.py` the search.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.binding.checks import nvte_check
from nemo_fp8_recipes.emulation.binding.releases import release
from nemo_fp8_recipes.emulation.binding.router_steps import (
    SOURCE,
    Steps,
    check_score_function,
    normalizes,
    sqrt_softplus,
)
from nemo_fp8_recipes.emulation.binding.router_topk import topk as largest

__all__ = [
    "fused_score_for_moe_aux_loss_fwd",
    "fused_topk_with_score_function_fwd",
    "fused_topk_with_score_function_qb_fwd",
]

BYTEMAP, BITMAP = 0, 1
_INDEX_DTYPES = (torch.int16, torch.int32, torch.int64)


def _rows(logits: Tensor) -> Tensor:
    """fp32 [tokens, experts]."""
    nvte_check(logits.is_contiguous(), SOURCE, "logits must be contiguous")
    nvte_check(logits.numel() > 0, SOURCE, "num_tokens and num_experts must be greater than 0")
    return logits.detach().to(torch.float32).reshape(-1, logits.shape[-1])


def _routing_map(chosen: Tensor, experts: int, leading: torch.Size, routing_map_format: int) -> Tensor:
    """bool [..., experts], or bits uint8 [..., experts / 8 rounded up], the lowest first."""
    chosen_map = torch.zeros(chosen.shape[0], experts, dtype=torch.bool)
    chosen_map.scatter_(1, chosen, True)
    if routing_map_format != BITMAP:
        return chosen_map.view(*leading, experts)
    padded = torch.nn.functional.pad(chosen_map, (0, -experts % 8)).view(chosen.shape[0], -1, 8)
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)
    return (padded * weights).sum(dim=-1, dtype=torch.uint8).view(*leading, -1)


def _check_format(routing_map_format: int) -> None:
    nvte_check(
        routing_map_format in (BYTEMAP, BITMAP),
        SOURCE,
        f"routing_map_format must be BYTEMAP (0) or BITMAP_U8 (1), got {routing_map_format}",
    )


def _check_indices(indices: Tensor, leading: torch.Size, topk: int, routing_map_format: int) -> None:
    nvte_check(
        routing_map_format != BITMAP,
        SOURCE,
        "topk_indices output cannot be combined with non-default routing_map_format; "
        "dense top-k indices are returned instead of a routing map.",
    )
    nvte_check(indices.is_contiguous(), SOURCE, "topk_indices must be contiguous")
    nvte_check(
        indices.dtype in _INDEX_DTYPES,
        SOURCE,
        f"topk_indices dtype must be int16, int32, or int64, got {indices.dtype}",
    )
    expected = (*leading, topk)
    nvte_check(
        tuple(indices.shape) == expected,
        SOURCE,
        f"topk_indices shape must be [*leading_dims, topk]={expected}, got {tuple(indices.shape)}",
    )


def _scores(
    logits: Tensor, steps: Steps, score_function: str, bias: Tensor | None, *, softmax_first: bool
) -> tuple[Tensor, Tensor]:
    """What experts are selected by, and what the backward pass needs; fp32 [tokens, experts]."""
    kept = torch.full_like(logits, -math.inf)
    scores = logits
    if score_function == "sigmoid":
        kept = scores = steps.store(torch.sigmoid(logits))
    elif score_function == "sqrtsoftplus":
        kept, scores = logits, sqrt_softplus(logits)
    elif softmax_first:
        kept = scores = steps.softmax(logits)
    if bias is not None and score_function != "softmax":
        scores = steps.store(scores + bias.detach().to(torch.float32))
    return scores, kept


def _select(
    scores: Tensor, steps: Steps, topk: int, num_groups: int | None, group_topk: int | None
) -> tuple[Tensor, Tensor]:
    """Columns of the selected experts, [tokens, topk], of the best groups where there are groups, and what
    they were selected by.
    """
    experts = scores.shape[1]

    def search(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return largest(x, count, radix_for=topk, experts=experts)

    if not group_topk or group_topk < 0:
        return search(scores, topk)
    assert num_groups is not None
    size = experts // num_groups
    each = topk // group_topk
    group_scores = torch.zeros(len(scores), num_groups)
    for group in range(num_groups):
        part = scores[:, group * size : (group + 1) * size]
        _, best = search(part, each)
        for place in range(each):
            group_scores[:, group] = steps.store(group_scores[:, group] + best[:, place])
    groups, _ = search(group_scores, group_topk)
    there = torch.zeros(len(scores), num_groups, dtype=torch.bool).scatter_(1, groups, True)
    masked = scores.masked_fill(~there.repeat_interleave(size, dim=1), -math.inf)
    return search(masked, topk)


def _finish(
    chosen: Tensor,
    best: Tensor,
    kept: Tensor,
    steps: Steps,
    score_function: str,
    bias: Tensor | None,
    *,
    softmax_first: bool,
    factor: float,
    dtype: torch.dtype,
) -> Tensor:
    """Probabilities [tokens, experts], zero for experts that are not selected; `kept` is completed."""
    if score_function == "softmax":
        if not softmax_first:
            best = steps.softmax(best)
            kept.scatter_(1, chosen, best)
    else:
        if bias is not None:
            best = steps.store(best - bias.detach().to(torch.float32)[chosen])
        if chosen.shape[1] > 1:
            best = steps.normalized(best)
    scaled = torch.tensor(factor, dtype=torch.float32) * best.to(steps.wide)
    return torch.zeros(kept.shape, dtype=dtype).scatter_(1, chosen, scaled.to(dtype))


def fused_topk_with_score_function_fwd(
    logits: Tensor,
    topk: int,
    use_pre_softmax: bool,
    num_groups: int | None,
    group_topk: int | None,
    scaling_factor: float | None,
    score_function: str,
    expert_bias: Tensor | None,
    routing_map_format: int = 0,
    topk_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities [..., experts] in the dtype of the logits, the routing map (or `topk_indices`, filled),
    and what the backward pass needs.
    """
    _check_format(int(routing_map_format))
    flat = _rows(logits)
    experts = flat.shape[1]
    nvte_check(0 < topk <= experts, SOURCE, f"topk must be in [1, num_experts], got topk={topk}")
    check_score_function(score_function)
    nvte_check(
        expert_bias is None or score_function != "softmax",
        SOURCE,
        "score_function must be sigmoid or sqrtsoftplus when expert_bias is not None",
    )
    nvte_check(
        expert_bias is None or expert_bias.dtype == torch.float32 or not release().router_in_fp32,
        SOURCE,
        "expert_bias must be a float32 tensor",
    )
    leading = logits.shape[:-1]
    if topk_indices is not None:
        _check_indices(topk_indices, leading, topk, int(routing_map_format))
    steps = Steps(logits.dtype)
    softmax_first = use_pre_softmax and score_function == "softmax"
    scores, kept = _scores(flat, steps, score_function, expert_bias, softmax_first=softmax_first)
    chosen, best = _select(scores, steps, topk, num_groups, group_topk)
    probs = _finish(
        chosen,
        best,
        kept,
        steps,
        score_function,
        expert_bias,
        softmax_first=softmax_first,
        factor=1.0 if scaling_factor is None else scaling_factor,
        dtype=logits.dtype,
    )
    output = _routed(chosen, experts, leading, int(routing_map_format), topk_indices)
    return probs.view(logits.shape), output, kept.to(steps.stored).view(logits.shape)


def _routed(
    chosen: Tensor, experts: int, leading: torch.Size, routing_map_format: int, indices: Tensor | None
) -> Tensor:
    if indices is None:
        return _routing_map(chosen, experts, leading, routing_map_format)
    indices.copy_(chosen.view(indices.shape))
    return indices


def fused_topk_with_score_function_qb_fwd(
    logits: Tensor,
    topk: int,
    scaling_factor: float | None,
    expert_bias: Tensor,
    routing_map_format: int,
    topk_indices: Tensor | None,
    histogram: Tensor,
    bin_bounds: Tensor,
    histogram_mode: int,
    bin_bounds_validated: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sigmoid routing that also counts, for every expert, which bias would have made each token choose it:
    one expert more is looked up, its biased score is the token's cutoff, and cutoff - score falls into a bin.
    """
    _check_format(int(routing_map_format))
    flat = _rows(logits)
    tokens, experts = flat.shape
    nvte_check(0 < topk < experts, SOURCE, f"QB topk must be in [1, num_experts), got topk={topk}")
    for name, given, dtype, shape in (
        ("expert_bias", expert_bias, "float32", ("num_experts",)),
        ("histogram", histogram, "int32", ("num_experts", "num_bins")),
    ):
        nvte_check(given.is_contiguous(), SOURCE, f"QB {name} must be a contiguous CUDA tensor")
        nvte_check(given.dtype == getattr(torch, dtype), SOURCE, f"QB {name} must have {dtype} dtype")
        nvte_check(
            given.dim() == len(shape) and given.shape[0] == experts and given.numel() > 0,
            SOURCE,
            f"QB {name} must have shape [{', '.join(shape)}]",
        )
    nvte_check(
        bin_bounds.dtype == torch.float32 and tuple(bin_bounds.shape) == (2,),
        SOURCE,
        "QB bin_bounds must be float32 with shape [2]",
    )
    nvte_check(int(histogram_mode) in (0, 1), SOURCE, f"Unsupported QB histogram mode: {int(histogram_mode)}")
    lower, upper = (bound.item() for bound in bin_bounds)
    nvte_check(
        bin_bounds_validated or (math.isfinite(lower) and math.isfinite(upper) and lower < upper),
        "common/fused_router/fused_topk_with_score_function.cu",
        f"QB bin_bounds values must be finite with lower < upper, got [{lower}, {upper}]",
    )
    leading = logits.shape[:-1]
    if topk_indices is not None:
        _check_indices(topk_indices, leading, topk, int(routing_map_format))
    steps = Steps(logits.dtype)
    scores, kept = _scores(flat, steps, "sigmoid", expert_bias, softmax_first=False)
    candidates, values = largest(scores, topk + 1, radix_for=topk, experts=experts)
    dropped = _smallest(candidates, values)
    cutoff = values.gather(1, dropped)[:, 0]
    places = torch.arange(topk).expand(tokens, -1)
    places = places + (places >= dropped)
    chosen, best = candidates.gather(1, places), values.gather(1, places)
    probs = _finish(
        chosen,
        best,
        kept,
        steps,
        "sigmoid",
        expert_bias,
        softmax_first=False,
        factor=1.0 if scaling_factor is None else scaling_factor,
        dtype=logits.dtype,
    )
    bins = histogram.shape[1]
    scale = bins / (bin_bounds[1] - bin_bounds[0])
    found = torch.floor((cutoff[:, None] - kept - bin_bounds[0]) * scale)
    found = found.nan_to_num(nan=0.0).clamp(0, bins - 1).long()  # a NaN is converted to 0
    places = torch.arange(experts) * bins + found
    histogram += torch.bincount(places.flatten(), minlength=experts * bins).view(histogram.shape).int()
    output = _routed(chosen, experts, leading, int(routing_map_format), topk_indices)
    return probs.view(logits.shape), output, kept.view(logits.shape), cutoff, histogram


def _smallest(columns: Tensor, values: Tensor) -> Tensor:
    """Place of the smallest value of each row, int64 [rows, 1]: of equal ones that of the last column."""
    place = torch.zeros_like(columns[:, :1])
    for other in range(1, columns.shape[1]):
        value, column = values.gather(1, place)[:, 0], columns.gather(1, place)[:, 0]
        equal = (values[:, other] == value) & (columns[:, other] > column)
        place[(values[:, other] < value) | equal] = other
    return place


def fused_score_for_moe_aux_loss_fwd(
    logits: Tensor, topk: int, score_function: str, routing_map_format: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of all experts for the auxiliary loss, the routing map, and what the backward pass needs."""
    _check_format(int(routing_map_format))
    flat = _rows(logits)
    nvte_check(topk > 0, SOURCE, "topk must be greater than 0")
    check_score_function(score_function)
    steps = Steps(logits.dtype)
    scores, kept = _scores(flat, steps, score_function, None, softmax_first=True)
    if score_function != "softmax" and normalizes(topk):
        scores = steps.normalized(scores)
    chosen, _ = _select(scores, steps, topk, None, None)
    routed = _routing_map(chosen, flat.shape[1], logits.shape[:-1], int(routing_map_format))
    return scores.to(steps.stored).view(logits.shape), routed, kept.to(steps.stored).view(logits.shape)
