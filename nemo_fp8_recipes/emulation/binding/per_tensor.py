"""Per-tensor FP8: delayed and current ("tensorwise") scaling.

Follows `Float8Quantizer` and `Float8CurrentScalingQuantizer` in `pytorch/csrc/quantizer.cpp`. Buffers:
`_data` (shape of the tensor), `_transpose` (last dimension in front; only where the device's FP8 GEMM takes
the TN layout alone), `_scale_inv` fp32 (1,).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation import kernels
from nemo_fp8_recipes.emulation.binding.checks import nvte_check
from nemo_fp8_recipes.emulation.binding.device import non_tn_fp8_gemm_supported
from nemo_fp8_recipes.emulation.binding.dtypes import fp8_format
from nemo_fp8_recipes.emulation.binding.overwrite import overwrite
from nemo_fp8_recipes.emulation.binding.releases import release
from nemo_fp8_recipes.emulation.binding.storage import (
    SOURCE,
    Buffers,
    BufferSpec,
    allocate,
    flat_2d,
    transposed_shape,
)
from nemo_fp8_recipes.emulation.binding.te_classes import element_type, te_classes
from nemo_fp8_recipes.numerics import tensorwise
from nemo_fp8_recipes.numerics.scale import amax, reciprocal, scale_from_amax

__all__ = ["CURRENT", "DELAYED", "CurrentScaling", "DelayedScaling", "amax_of"]


def amax_of(x: Tensor) -> Tensor:
    """Largest magnitude, NaN ignored; fp32 ()."""
    if x.is_contiguous():
        compiled = kernels.for_tensor(x)
        if compiled is not None:
            return torch.tensor(compiled.amax(x))
    return amax(x)


class _PerTensor(ABC):
    attributes: tuple[str, ...] = ("_data", "_transpose", "_scale_inv")

    def specs(self, quantizer: Any, shape: Sequence[int]) -> dict[str, BufferSpec]:
        any_layout = non_tn_fp8_gemm_supported()
        specs: dict[str, BufferSpec] = {}
        if quantizer.rowwise_usage or any_layout:
            specs["_data"] = (tuple(shape), torch.uint8)
        if quantizer.columnwise_usage and not any_layout:
            specs["_transpose"] = (transposed_shape(shape), torch.uint8)
        nvte_check(bool(specs), SOURCE, f"Invalid usages for {type(quantizer).__name__}.")
        specs["_scale_inv"] = ((1,), torch.float32)
        return specs

    def shape_of(self, tensor: Any) -> tuple[int, ...]:
        nvte_check(
            isinstance(tensor, te_classes().float8_storage),
            SOURCE,
            f"FP8 quantizer must output to Float8Tensor, got {type(tensor).__name__}.",
        )
        data, transpose = tensor._data, tensor._transpose
        nvte_check(data is not None or transpose is not None, SOURCE, "Float8Tensor has no data.")
        if data is not None:
            shape = tuple(data.shape)
            nvte_check(
                transpose is None or tuple(transpose.shape) == transposed_shape(shape),
                SOURCE,
                f"FP8 data (shape={shape}) and transpose "
                f"(shape={None if transpose is None else tuple(transpose.shape)}) do not match",
            )
            return shape
        return (*transpose.shape[1:], *transpose.shape[:1])

    def wrap(
        self,
        quantizer: Any,
        buffers: Mapping[str, Tensor],
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Any:
        classes = te_classes()
        fields = {
            "data": buffers.get("_data"),
            "data_transpose": buffers.get("_transpose"),
            "fp8_scale_inv": buffers["_scale_inv"],
            "fp8_dtype": element_type(quantizer.dtype),
            "quantizer": quantizer,
        }
        if quantizer.internal:
            return classes.float8_storage(**release().constructor(fields | {"fake_dtype": dtype}))
        return classes.float8_tensor(**fields, shape=tuple(shape), dtype=dtype, device=device)

    def retag(self, quantizer: Any, tensor: Any) -> None:
        tensor._fp8_dtype = element_type(quantizer.dtype)
        tensor._transpose_invalid = tensor._transpose is None

    @abstractmethod
    def encode(self, quantizer: Any, x: Tensor) -> Buffers: ...

    def _cast(
        self, quantizer: Any, x: Tensor, scale: Tensor, *, observe: bool
    ) -> tuple[Buffers, Tensor | None]:
        """Codes of x under a given scale, and with `observe` x's amax (1,)."""
        specs = self.specs(quantizer, x.shape)
        if "_data" not in specs:
            # The cast-transpose kernel needs rowwise storage.
            raise NotImplementedError(
                "Columnwise-only per-tensor FP8 quantization is not implemented; "
                "the cast-transpose kernel requires rowwise output storage."
            )
        fmt = fp8_format(quantizer.dtype)
        matrix = x.view(flat_2d(x.shape))
        compiled = kernels.for_tensor(x)
        if compiled is not None:
            buffers = allocate(self, quantizer, x.shape, x.device)
            transposed = buffers.get("_transpose")
            largest = compiled.cast(matrix, fmt, scale.item(), buffers["_data"], transposed, observe=observe)
            buffers["_scale_inv"] = reciprocal(scale.reshape(1))
            return buffers, torch.tensor([largest]) if observe else None
        codes = tensorwise.quantize(matrix, fmt, scale)
        buffers = {"_data": codes.view(x.shape), "_scale_inv": reciprocal(scale.reshape(1))}
        if "_transpose" in specs:
            buffers["_transpose"] = codes.t().contiguous().view(specs["_transpose"][0])
        return buffers, amax(x).reshape(1) if observe else None


class DelayedScaling(_PerTensor):
    """`Float8Quantizer`: the scale is given; the amax goes by maximum into the live row of the history."""

    def encode(self, quantizer: Any, x: Tensor) -> Buffers:
        live = quantizer.amax
        # An empty tensor is C++'s null pointer: the amax is not wanted.
        buffers, largest = self._cast(quantizer, x, quantizer.scale.detach(), observe=live.numel() > 0)
        if largest is not None:
            overwrite(live, torch.maximum(live, largest.view(live.shape)))
        return buffers


class CurrentScaling(_PerTensor):
    """`Float8CurrentScalingQuantizer`: scale from the amax of this tensor, reduced over a group when asked
    for.
    """

    def encode(self, quantizer: Any, x: Tensor) -> Buffers:
        return self.encode_knowing(quantizer, x, None)

    def encode_knowing(self, quantizer: Any, x: Tensor, known: Tensor | None) -> Buffers:
        """`encode`, with this rank's amax fp32 () in place of that of x."""
        fmt = fp8_format(quantizer.dtype)
        keeps_buffers = release().current_scaling_buffers
        if known is not None:
            largest = known.reshape(1).clone()
        elif keeps_buffers and quantizer.use_existing_amax:
            largest = quantizer.amax.detach().clone()
        else:
            largest = amax_of(x).reshape(1)
        if quantizer.with_amax_reduction:
            group = quantizer._canonicalized_amax_reduction_group()
            torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
        scale = scale_from_amax(
            largest,
            fmt.max,
            epsilon=float(quantizer.amax_epsilon),
            power_of_two=bool(quantizer.force_pow_2_scales),
        )
        if keeps_buffers:
            overwrite(quantizer.amax, largest)
            overwrite(quantizer.scale, scale)
        buffers, _ = self._cast(quantizer, x, scale, observe=False)
        return buffers


DELAYED = DelayedScaling()
CURRENT = CurrentScaling()
