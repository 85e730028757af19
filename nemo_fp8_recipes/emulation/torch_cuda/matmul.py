"""BF16 and FP16 matrix products as tensor cores make them: FP32 products and sums, rounded once.

A CPU without 16-bit matrix instructions computes them some 10 to 60 times slower than FP32 products:
attention and the output layer would take most of a training step. Only the functions are wrapped by which
Transformer Engine, Megatron-Core and plain torch modules multiply matrices; in the backward pass autograd
then multiplies in FP32, too, and rounds the gradient once. Under autocast the operands are rounded to its
type first."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from nemo_fp8_recipes.emulation.ledger import PatchLedger

__all__ = ["apply"]

_SIXTEEN_BITS = frozenset({torch.bfloat16, torch.float16})
_AUTOCAST_FROM = _SIXTEEN_BITS | {torch.float32}
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
        kind = None if arguments or options else _sixteen_bit(a, b)
        if kind is None:
            return product(a, b, *arguments, **options)
        with _no_autocast():
            return product(_rounded(a, kind), _rounded(b, kind)).to(kind)

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
        kind = None if options else _sixteen_bit(a, b)
        if kind is None:
            return product(added, a, b, beta=beta, alpha=alpha, **options)
        with _no_autocast():
            # With beta=0 `added` may hold anything, NaN too, and is ignored.
            operands = _rounded(added, kind), _rounded(a, kind), _rounded(b, kind)
            return product(*operands, beta=beta, alpha=alpha).to(kind)

    return baddbmm


def _linear_in_fp32(linear: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(linear)
    def wrapped(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        kind = _sixteen_bit(input, weight)
        if kind is None:
            return linear(input, weight, bias)
        with _no_autocast():
            added = None if bias is None else _rounded(bias, kind)
            return linear(_rounded(input, kind), _rounded(weight, kind), added).to(kind)

    return wrapped


def _sixteen_bit(a: Any, b: Any) -> torch.dtype | None:
    """The 16-bit type in which two plain tensors are multiplied: their own, or autocast's. None for anything
    else; tensor subclasses multiply as they define.
    """
    plain = (torch.Tensor, torch.nn.Parameter)
    if type(a) not in plain or type(b) not in plain:
        return None
    if torch.is_autocast_enabled("cpu"):
        kind = torch.get_autocast_dtype("cpu")
        cast = a.dtype in _AUTOCAST_FROM and b.dtype in _AUTOCAST_FROM
    else:
        kind, cast = a.dtype, b.dtype == a.dtype
    return kind if cast and kind in _SIXTEEN_BITS else None


def _rounded(operand: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """In FP32, with no more bits than `kind` has."""
    return operand.to(kind).float()


def _no_autocast() -> AbstractContextManager[Any]:
    """It would cast the FP32 operands to 16 bits again."""
    return torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()
