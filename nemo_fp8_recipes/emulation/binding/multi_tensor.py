"""Operations over lists of tensors: SGD steps, norms, scaling, scales of many weights at once.

Follows `pytorch/csrc/extensions/multi_tensor/*.cpp` and `common/multi_tensor/*.cu` of Transformer Engine. All
compute in fp32 and write in place. `chunk_size` only cuts the work into thread blocks.
"""

# ruff: noqa: ARG001  # signatures are pybind's
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.binding.checks import nvte_check, nvte_error
from nemo_fp8_recipes.numerics.e8m0 import e8m0_from_amax
from nemo_fp8_recipes.numerics.formats import E4M3
from nemo_fp8_recipes.numerics.scale import reciprocal, scale_from_amax

__all__ = [
    "multi_tensor_compute_scale_and_scale_inv",
    "multi_tensor_compute_scale_inv_e8m0",
    "multi_tensor_l2norm",
    "multi_tensor_scale",
    "multi_tensor_scale_tensor",
    "multi_tensor_sgd",
    "multi_tensor_unscale_l2norm",
]

TensorLists = Sequence[Sequence[Tensor]]


def multi_tensor_sgd(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: TensorLists,
    wd: float,
    momentum: float,
    dampening: float,
    lr: float,
    nesterov: bool,
    first_run: bool,
    wd_after_momentum: bool,
    scale: float,
) -> None:
    """One SGD step: gradients (times `scale`), parameters, momenta and optionally fp16 copies of the
    parameters.
    """
    if noop_flag.item() != 0:
        return
    for grad, parameter, velocity, *copies in zip(*tensor_lists, strict=True):
        g = grad.detach().to(torch.float32) * scale
        value = parameter.detach().to(torch.float32)
        if wd != 0.0 and not wd_after_momentum:
            g = g + wd * value
        if momentum != 0.0:
            old = velocity.detach().to(torch.float32)
            new = g if first_run else old * momentum + (1.0 - dampening) * g
            velocity.detach().copy_(new)
            g = g + momentum * new if nesterov else new
        if wd != 0.0 and wd_after_momentum:
            g = g + wd * value
        # C++ adds in the parameter's own type, so the step is rounded to it first.
        step = (-lr * g).to(parameter.dtype).to(torch.float32)
        parameter.detach().copy_(value + step)
        for copy in copies:
            copy.detach().copy_(parameter)


def multi_tensor_scale(
    chunk_size: int,
    is_infinite: Tensor,
    tensor_lists: TensorLists,
    scale: float,
) -> None:
    """outputs = inputs * scale; `is_infinite` becomes 1 where an input is not finite."""
    for source, target in zip(*tensor_lists, strict=True):
        value = source.detach().to(torch.float32)
        if not torch.isfinite(value).all():
            is_infinite.fill_(1)
        target.detach().copy_(value * scale)


def multi_tensor_scale_tensor(
    chunk_size: int, is_infinite: Tensor, tensor_lists: TensorLists, scale: Tensor
) -> None:
    """`multi_tensor_scale` with the scale in a tensor of one element."""
    multi_tensor_scale(chunk_size, is_infinite, tensor_lists, float(scale.item()))


def multi_tensor_l2norm(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: TensorLists,
    per_tensor: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """L2 norm of all tensors together, fp32 (1,), and of each, fp32 [tensors] when asked for, else empty."""
    return _l2norm(tensor_lists[0], 1.0, bool(per_tensor))


def multi_tensor_unscale_l2norm(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: TensorLists,
    inv_scale: Tensor,
    per_tensor: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """`multi_tensor_l2norm` of the tensors times `inv_scale`; the tensors stay as they are."""
    return _l2norm(tensor_lists[0], float(inv_scale.item()), bool(per_tensor))


def _l2norm(tensors: Sequence[Tensor], factor: float, per_tensor: bool) -> tuple[Tensor, Tensor]:
    squares = torch.stack([(t.detach().to(torch.float32) * factor).square().sum() for t in tensors])
    total = squares.sum().sqrt().reshape(1)
    return total, squares.sqrt() if per_tensor else total.new_empty(0)


def multi_tensor_compute_scale_and_scale_inv(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: TensorLists,
    max_fp8: float,
    force_pow_2_scales: bool,
    epsilon: float,
) -> None:
    """From lists of amaxes, fill lists of scales and inverse scales, all fp32."""
    for amax, scale, scale_inv in zip(*tensor_lists, strict=True):
        found = scale_from_amax(
            amax.detach(), max_fp8, epsilon=epsilon, power_of_two=bool(force_pow_2_scales)
        )
        scale.detach().copy_(found.view(scale.shape))
        scale_inv.detach().copy_(reciprocal(found).view(scale_inv.shape))


def multi_tensor_compute_scale_inv_e8m0(
    chunk_size: int,
    noop_flag: None,
    tensor_lists: TensorLists,
) -> None:
    """From lists of bf16 amaxes, fill lists of E8M0 scales (uint8) of E4M3 blocks."""
    source = "common/multi_tensor/compute_scale.cu"
    if noop_flag is not None:
        nvte_error(source, "No-op flag is not supported.")
    for amax, scale_inv in zip(*tensor_lists, strict=True):
        nvte_check(amax.dtype == torch.bfloat16, source, "amax should be bf16")
        nvte_check(scale_inv.dtype == torch.uint8, source, "scale_inv should be e8m0/uint8")
        codes = e8m0_from_amax(amax.detach().to(torch.float32), E4M3)
        scale_inv.detach().copy_(codes.view(scale_inv.shape))
