"""BF16 and FP16 matrix products as tensor cores make them: FP32 products and sums, rounded once.

A CPU without 16-bit matrix instructions computes them some 10 to 60 times slower than FP32 products:
attention and the output layer would take most of a training step. Only the functions are wrapped by which
Transformer Engine, Megatron-Core and plain torch modules multiply matrices; in the backward pass autograd
then multiplies in FP32, too, and rounds the gradient once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from nemo_fp8_recipes.emulation.ledger import PatchLedger

__all__ = ["apply"]

_SIXTEEN_BITS = frozenset({torch.bfloat16, torch.float16})
_REASON = "tensor cores accumulate 16-bit products in FP32; the host's own 16-bit products are very slow"


def apply(ledger: PatchLedger) -> None:
    """Wrap `mm`, `bmm`, `matmul` and `linear` for two operands, and `baddbmm`."""
    for owner, name in (
        (torch, "mm"),
        (torch, "bmm"),
        (torch, "matmul"),
        (torch.Tensor, "mm"),
        (torch.Tensor, "bmm"),
        (torch.Tensor, "matmul"),
        (torch.Tensor, "__matmul__"),
    ):
        ledger.set(owner, name, _in_fp32(getattr(owner, name)), _REASON)
    ledger.set(torch, "baddbmm", _baddbmm_in_fp32(torch.baddbmm), _REASON)
    ledger.set(torch.nn.functional, "linear", _linear_in_fp32(torch.nn.functional.linear), _REASON)


def _in_fp32(product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(product)
    def wrapped(a: torch.Tensor, b: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if arguments or options or not _sixteen_bit(a, b):
            return product(a, b, *arguments, **options)
        return product(a.float(), b.float()).to(a.dtype)

    return wrapped


def _baddbmm_in_fp32(product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(product)
    def baddbmm(
        added: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        *,
        beta: float = 1,
        alpha: float = 1,
        **options: Any,
    ) -> torch.Tensor:
        if options or not _sixteen_bit(a, b):
            return product(added, a, b, beta=beta, alpha=alpha, **options)
        # With beta=0 `added` may hold anything, NaN too, and is ignored.
        return product(added.float(), a.float(), b.float(), beta=beta, alpha=alpha).to(a.dtype)

    return baddbmm


def _linear_in_fp32(linear: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(linear)
    def wrapped(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if not _sixteen_bit(input, weight):
            return linear(input, weight, bias)
        return linear(input.float(), weight.float(), None if bias is None else bias.float()).to(input.dtype)

    return wrapped


def _sixteen_bit(a: Any, b: Any) -> bool:
    """Two plain tensors of one 16-bit type; tensor subclasses multiply as they define."""
    return (
        type(a) in (torch.Tensor, torch.nn.Parameter)
        and type(b) in (torch.Tensor, torch.nn.Parameter)
        and a.dtype in _SIXTEEN_BITS
        and b.dtype == a.dtype
    )
