"""The steps of the router's kernels.

Follows `common/fused_router/utils.h` of Transformer Engine. Scores are fp32 since 2.14; 2.11 stores each step
in the dtype of the logits and sums in fp64. What is not followed is the order of a sum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.binding.checks import nvte_check
from nemo_fp8_recipes.emulation.binding.releases import release

__all__ = ["Steps", "check_score_function", "normalizes", "sqrt_softplus", "sqrt_softplus_backward"]

SOURCE = "pytorch/csrc/extensions/router.cpp"
EPSILON = 1e-20
WARP = 32


class Steps:
    """How a release computes: the dtype that steps are stored in, and the one of sums."""

    def __init__(self, logits: torch.dtype) -> None:
        fp32 = release().router_in_fp32
        self.stored = torch.float32 if fp32 else logits
        self.wide = torch.float32 if fp32 else torch.float64

    def store(self, x: Tensor) -> Tensor:
        """What a later step reads, in fp32."""
        return x.to(self.stored).to(torch.float32)

    def total(self, x: Tensor) -> Tensor:
        """Sum of each row, [rows, 1], in the dtype of sums."""
        return x.to(self.wide).sum(dim=-1, keepdim=True).to(self.stored).to(self.wide)

    def softmax(self, x: Tensor) -> Tensor:
        powers = self.store(torch.exp(x - x.amax(dim=-1, keepdim=True)))
        if not release().router_softmax_online:
            return self.store(powers / self.total(powers).to(torch.float32))
        # A lane whose first score is -infinity begins its sum with exp(-inf - -inf): the row is NaN.
        spoiled = (x[:, :WARP] == -math.inf).any(dim=-1, keepdim=True)
        return (powers * (1.0 / self.total(powers))).masked_fill(spoiled, math.nan)

    def softmax_backward(self, grad: Tensor, output: Tensor, mask: Tensor | None) -> Tensor:
        product = self.store(grad * output)
        if mask is not None:
            product = torch.where(mask, product, 0.0)
        result = self.store(output * (grad - self.total(product).to(torch.float32)))
        return result if mask is None else torch.where(mask, result, 0.0)

    def normalized(self, x: Tensor) -> Tensor:
        return self.store(x.to(self.wide) / (self.total(x) + EPSILON))

    def normalized_backward(self, grad: Tensor, output: Tensor, mask: Tensor | None) -> Tensor:
        product = self.store(grad * output)
        if mask is not None:
            output, product = torch.where(mask, output, 0.0), torch.where(mask, product, 0.0)
        denominator = self.total(output) + EPSILON
        result = grad.to(self.wide) / denominator - self.total(product) / (denominator * denominator)
        result = self.store(result)
        return result if mask is None else torch.where(mask, result, 0.0)

    def sigmoid_backward(self, grad: Tensor, output: Tensor) -> Tensor:
        y = output.to(self.wide)
        return self.store(grad.to(self.wide) * y * (1.0 - y))


def sqrt_softplus(x: Tensor) -> Tensor:
    return torch.where(x > 20.0, x, torch.log1p(torch.exp(x))).sqrt()


def sqrt_softplus_backward(grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
    slope = torch.where(x > 20.0, 1.0, torch.sigmoid(x))
    return grad * (slope / (2.0 * y + EPSILON))


def check_score_function(name: str) -> None:
    known = ("softmax", "sigmoid", "sqrtsoftplus") if release().router_in_fp32 else ("softmax", "sigmoid")
    words = f"{', '.join(known[:-1])} or {known[-1]}"
    nvte_check(name in known, SOURCE, f"score_function must be {words} for router fusion")


def normalizes(topk: int) -> bool:
    """Whether scores for the auxiliary loss are divided by their sum."""
    return topk > 1 or release().router_in_fp32
