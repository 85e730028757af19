"""Adam steps over lists of tensors.

Follows `pytorch/csrc/extensions/multi_tensor/adam.cpp` and `common/multi_tensor/adam.cu` of Transformer
Engine. All compute in fp32 and write in place; the variants differ in where the exact parameter is kept and
in what they read on the device. `chunk_size` only cuts the work into thread blocks.
"""

# ruff: noqa: ARG001  # signatures are pybind's
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.binding.checks import nvte_check
from nemo_fp8_recipes.emulation.binding.dtypes import fp8_format
from nemo_fp8_recipes.numerics.cast import saturating_cast
from nemo_fp8_recipes.numerics.scale import amax, reciprocal

__all__ = [
    "multi_tensor_adam",
    "multi_tensor_adam_capturable",
    "multi_tensor_adam_capturable_master",
    "multi_tensor_adam_fp8",
    "multi_tensor_adam_param_remainder",
]

SOURCE = "common/multi_tensor/adam.cu"
L2_MODE, DECOUPLED_MODE = 0, 1

TensorLists = Sequence[Sequence[Tensor]]


@dataclass(frozen=True)
class _Adam:
    """Hyperparameters of one step. `mode`: weight decay is added to the gradient (0) or the update (1)."""

    lr: float
    beta1: float
    beta2: float
    epsilon: float
    step: int
    mode: int
    bias_correction: int
    weight_decay: float

    def __call__(self, grad: Tensor, value: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """The stepped value, fp32; the moments are written.

        Args:
            grad: gradient, fp32.
            value: exact parameter, fp32.
            first, second: moments of any dtype.
        """
        correction1 = 1.0 - self.beta1**self.step if self.bias_correction == 1 else 1.0
        correction2 = 1.0 - self.beta2**self.step if self.bias_correction == 1 else 1.0
        g = grad + self.weight_decay * value if self.mode == L2_MODE else grad
        m = self.beta1 * first.detach().to(torch.float32) + (1.0 - self.beta1) * g
        v = self.beta2 * second.detach().to(torch.float32) + (1.0 - self.beta2) * g * g
        update = (m / correction1) / ((v / correction2).sqrt_() + self.epsilon)
        if self.mode == DECOUPLED_MODE:
            update.add_(value, alpha=self.weight_decay)
        first.detach().copy_(m)
        second.detach().copy_(v)
        return value - self.lr * update


def multi_tensor_adam(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: TensorLists,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """One Adam step.

    Args:
        tensor_lists: gradients, parameters, first and second moments, and optionally fp32 master parameters,
            which are then what is stepped; the parameters receive the rounded result.
        step: number of this step, counted from 1.
        mode: 0 adds weight decay to the gradient (Adam), 1 to the update (AdamW).
        bias_correction: 1 to correct the moments for their start at zero.
    """
    _require_lists(tensor_lists, 4, 5)
    adam = _Adam(lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay)
    for grad, parameter, first, second, *master in zip(*tensor_lists, strict=True):
        target = master[0] if master else parameter
        stepped = adam(_fp32(grad), _fp32(target), first, second)
        parameter.detach().copy_(stepped)
        if master:
            target.detach().copy_(stepped)


def multi_tensor_adam_param_remainder(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: TensorLists,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """One Adam step of bf16 parameters whose fp32 masters are kept as the 16 bits that bf16 lacks.

    Args:
        tensor_lists: gradients, bf16 parameters, first and second moments, int16 remainders: the low half of
            the master; where it is negative the parameter was rounded up, away from zero.
        (the rest as for `multi_tensor_adam`)
    """
    _require_lists(tensor_lists, 5)
    adam = _Adam(lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay)
    for grad, parameter, first, second, remainder in zip(*tensor_lists, strict=True):
        low = remainder.detach().to(torch.int32)
        high = parameter.detach().contiguous().view(torch.int16).to(torch.int32) - (low < 0).to(torch.int32)
        master = ((high << 16) | (low & 0xFFFF)).view(torch.float32)
        bits = adam(_fp32(grad), master, first, second).view(torch.int32)
        low = bits.to(torch.int16)  # the low half, as C++ cuts it
        high = (bits >> 16) + (low < 0).to(torch.int32)
        remainder.detach().copy_(low)
        parameter.detach().copy_(high.to(torch.int16).view(torch.bfloat16))


def multi_tensor_adam_fp8(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: TensorLists,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
    fp8_dtype: Any,
) -> None:
    """One Adam step of FP8 primary weights with delayed scaling.

    Args:
        tensor_lists: gradients, uint8 codes of the parameters, first and second moments, fp32 masters,
            scales, amaxes (raised to the new parameters' own) and inverse scales (written).
        fp8_dtype: format of the codes.
        (the rest as for `multi_tensor_adam`)
    """
    _require_lists(tensor_lists, 8)
    adam = _Adam(lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay)
    fmt = fp8_format(fp8_dtype)
    for grad, codes, first, second, master, scale, largest, scale_inv in zip(*tensor_lists, strict=True):
        stepped = adam(_fp32(grad), _fp32(master), first, second)
        master.detach().copy_(stepped)
        codes.detach().copy_(saturating_cast(stepped * scale.detach(), fmt))
        largest.detach().copy_(torch.maximum(largest.detach(), amax(stepped).view(largest.shape)))
        scale_inv.detach().copy_(reciprocal(scale.detach()).view(scale_inv.shape))


def multi_tensor_adam_capturable(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: TensorLists,
    lr: Tensor,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: Tensor,
    mode: int,
    bias_correction: int,
    weight_decay: float,
    inv_scale: Tensor,
) -> None:
    """One Adam step whose learning rate, step and loss scale are read on the device.

    Args:
        noop_flag: 1: nothing is done.
        tensor_lists: gradients (multiplied with `inv_scale` in place), parameters, first and second moments.
        inv_scale: what the gradients are multiplied with.
        (the rest as for `multi_tensor_adam`)
    """
    _require_lists(tensor_lists, 4)
    adam = _on_device(lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay)
    _capturable(noop_flag, tensor_lists, adam, inv_scale)


def multi_tensor_adam_capturable_master(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: TensorLists,
    lr: Tensor,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: Tensor,
    mode: int,
    bias_correction: int,
    weight_decay: float,
    inv_scale: Tensor,
) -> None:
    """`multi_tensor_adam_capturable` with a fifth list, fp32 master parameters."""
    _require_lists(tensor_lists, 5)
    adam = _on_device(lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay)
    _capturable(noop_flag, tensor_lists, adam, inv_scale)


def _on_device(
    lr: Tensor,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: Tensor,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> _Adam:
    return _Adam(
        float(lr.item()), beta1, beta2, epsilon, int(step.item()), mode, bias_correction, weight_decay
    )


def _capturable(noop_flag: Tensor, tensor_lists: TensorLists, adam: _Adam, inv_scale: Tensor) -> None:
    if noop_flag.item() == 1:
        return
    factor = float(inv_scale.item())
    for grad, parameter, first, second, *master in zip(*tensor_lists, strict=True):
        target = master[0] if master else parameter
        g = _fp32(grad) * factor
        grad.detach().copy_(g)
        stepped = adam(g, _fp32(target), first, second)
        parameter.detach().copy_(stepped)
        if master:
            target.detach().copy_(stepped)


def _require_lists(tensor_lists: TensorLists, *allowed: int) -> None:
    nvte_check(
        len(tensor_lists) in allowed,
        SOURCE,
        f"Expected {' or '.join(map(str, allowed))} tensor lists, but found {len(tensor_lists)}",
    )
    for number, tensors in enumerate(tensor_lists):
        nvte_check(
            len(tensors) == len(tensor_lists[0]),
            SOURCE,
            f"Tensor list {number} has size={len(tensors)}, but expected size={len(tensor_lists[0])}",
        )


def _fp32(x: Tensor) -> Tensor:
    return x.detach().to(torch.float32)
