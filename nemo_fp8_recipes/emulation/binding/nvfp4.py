"""NVFP4: E2M1 elements packed in pairs, E4M3 block scales, an amax instead of a tensor scale.

Follows `NVFP4Quantizer` in `pytorch/csrc/quantizer.cpp` and the kernels that it starts
(`cast/dispatch/quantize.cuh`, `hadamard_transform/`). Buffers: `_rowwise_data` [..., K/2],
`_rowwise_scale_inv` uint8 [M rounded up to 128, K/16 rounded up to 4], and of the transposed matrix
`_columnwise_data` [K, M/2], `_columnwise_scale_inv` [K rounded up to 128, M/16 rounded up to 4]; padding is
zero. `_amax_rowwise` and `_amax_columnwise` fp32 (1,), or one a row with row scaling. The Hadamard transform
is applied to columnwise data only, whose amax is then that of the transformed matrix. With the quantizer's
`optimize_for_gemm` the scales are in the GEMM's swizzled order where TE's fused kernels write them so.

Stochastic rounding takes a key for each direction from torch's default generator, as a kernel takes one from
the device's on a GPU; the bits are others. Not emulated: what NVTE_USE_FAST_MATH changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation import kernels
from nemo_fp8_recipes.emulation.binding.block_storage import (
    ATTRIBUTES,
    data_of,
    pad_to,
    round_up,
    wrap,
)
from nemo_fp8_recipes.emulation.binding.checks import nvte_check
from nemo_fp8_recipes.emulation.binding.device import sm_arch
from nemo_fp8_recipes.emulation.binding.mxfp8 import TILE_K, TILE_M, swizzle
from nemo_fp8_recipes.emulation.binding.nvfp4_options import (
    environment_flag,
    four_over_six,
    require_supported,
    row_scaled,
)
from nemo_fp8_recipes.emulation.binding.per_tensor import amax_of
from nemo_fp8_recipes.emulation.binding.releases import Nvfp4Swizzle, release
from nemo_fp8_recipes.emulation.binding.storage import (
    SOURCE,
    Buffers,
    BufferSpec,
    allocate,
    flat_2d,
)
from nemo_fp8_recipes.emulation.binding.te_classes import element_type, te_classes
from nemo_fp8_recipes.numerics import amax, fp4, hadamard, nvfp4, nvfp4_4over6

__all__ = ["NVFP4", "Nvfp4Scaling", "fuses_amax", "scale_shape"]

BLOCK = nvfp4.BLOCK
AMAXES = ("_amax_rowwise", "_amax_columnwise")


def scale_shape(m: int, k: int) -> tuple[int, int]:
    """Padded shape of the scales of an [m, k] matrix, blocks along k."""
    return (round_up(m, TILE_M), round_up(k // BLOCK, TILE_K))


def fuses_amax(quantizer: Any) -> bool:
    """Whether the amax of a kernel that computed the tensor does: not that of rows, nor of what the Hadamard
    transform makes of it.
    """
    return not row_scaled(quantizer) and not quantizer.with_rht


class Nvfp4Scaling:
    """Storage of `NVFP4Quantizer`."""

    attributes: tuple[str, ...] = (*ATTRIBUTES, *AMAXES)

    def specs(self, quantizer: Any, shape: Sequence[int]) -> dict[str, BufferSpec]:
        m, k = flat_2d(shape)
        got = f"(got shape={tuple(shape)})"
        nvte_check(m % BLOCK == 0, SOURCE, f"First dim for NVFP4 must be divisible by {BLOCK} {got}")
        nvte_check(k % BLOCK == 0, SOURCE, f"NVFP4 requires tensor dims that are divisible by {BLOCK} {got}")
        each = row_scaled(quantizer)
        nvte_check(
            not each or quantizer.rowwise_usage,
            SOURCE,
            "Row-scaled NVFP4 quantization requires rowwise usage.",
        )
        specs: dict[str, BufferSpec] = {}
        if quantizer.rowwise_usage:
            specs["_rowwise_data"] = ((*shape[:-1], k // 2), torch.uint8)
            specs["_rowwise_scale_inv"] = (scale_shape(m, k), torch.uint8)
            specs["_amax_rowwise"] = ((m if each else 1,), torch.float32)
        if quantizer.columnwise_usage:
            specs["_columnwise_data"] = ((k, m // 2), torch.uint8)
            specs["_columnwise_scale_inv"] = (scale_shape(k, m), torch.uint8)
            specs["_amax_columnwise"] = ((k if each else 1,), torch.float32)
        return specs

    def shape_of(self, tensor: Any) -> tuple[int, ...]:
        refusal = "NVFP4Quantizer must output to IsNVFP4Tensor."
        rowwise, columnwise = data_of(tensor, te_classes().nvfp4_storage, refusal, "NVFP4Tensor")
        if rowwise is None:
            return (*columnwise.shape[1:-1], columnwise.shape[-1] * 2, columnwise.shape[0])
        shape = (*rowwise.shape[:-1], rowwise.shape[-1] * 2)
        if columnwise is not None:
            transposed = (columnwise[0].numel() * 2 if columnwise.shape[0] else 0, columnwise.shape[0])
            nvte_check(
                flat_2d(shape) == transposed or 0 in shape,
                SOURCE,
                f"NVFP4 row-wise data (shape={shape}) and column-wise data (shape={transposed}) do not match",
            )
        return shape

    def encode(self, quantizer: Any, x: Tensor) -> Buffers:
        return self.encode_under(quantizer, x, None)

    def encode_under(self, quantizer: Any, x: Tensor, amaxes: Buffers | None) -> Buffers:
        """`encode`, under amaxes that are given and kept as they are, or None: found in x."""
        require_supported(quantizer, x)
        matrix = x.view(flat_2d(x.shape))
        compiled = None if four_over_six(quantizer) else kernels.for_tensor(matrix)
        if compiled is None:
            return self._encode_with_torch(quantizer, matrix, x.shape, amaxes)
        buffers = allocate(self, quantizer, x.shape, x.device, zero_scales=True)
        sign_mask = int(quantizer.rht_matrix_random_sign_mask_t) if quantizer.with_rht else None
        if amaxes is None:
            if "_columnwise_data" in buffers and sign_mask is not None:
                rows, columns = compiled.amax_with_hadamard(matrix, sign_mask)
            elif row_scaled(quantizer):
                rows, columns = (amax(matrix, dim=dim) for dim in (1, 0))
            else:
                rows = columns = amax_of(matrix).view(1)
            amaxes = _amaxes(quantizer, rows, columns)
        buffers |= {name: amaxes[name] for name in AMAXES if name in buffers}
        stochastic = bool(quantizer.stochastic_rounding)
        compiled.nvfp4(
            matrix,
            _direction(buffers, "rowwise", stochastic),
            _direction(buffers, "columnwise", stochastic),
            square=bool(quantizer.with_2d_quantization),
            stochastic=stochastic,
            sign_mask=sign_mask,
            swizzled=self.swizzled(quantizer, x.shape),
            divided=release().nvfp4_divides,
        )
        return buffers

    def encode_knowing(self, quantizer: Any, x: Tensor, known: Tensor) -> Buffers:
        """`encode`, with this rank's amax fp32 () in place of that of x; where the quantizer `fuses_amax`."""
        return self.encode_under(quantizer, x, _amaxes(quantizer, known.reshape(1), known.reshape(1)))

    def _encode_with_torch(
        self, quantizer: Any, matrix: Tensor, shape: Sequence[int], amaxes: Buffers | None
    ) -> Buffers:
        specs = self.specs(quantizer, shape)
        sources = {"rowwise": matrix}
        if "_columnwise_data" in specs:
            columns = matrix.t().contiguous()
            if quantizer.with_rht:
                sign_mask = int(quantizer.rht_matrix_random_sign_mask_t)
                columns = hadamard.random_hadamard_transform(columns, sign_mask)
            sources["columnwise"] = columns
        if amaxes is None:
            each = 1 if row_scaled(quantizer) else None
            found = [amax(source, dim=each).view(-1) for source in sources.values()]
            amaxes = _amaxes(quantizer, found[0], found[-1])
        buffers = {name: amaxes[name] for name in AMAXES if name in specs}
        for direction, source in sources.items():
            if f"_{direction}_data" in specs:
                self._encode_direction(quantizer, direction, source, specs, buffers, shape)
        return buffers

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
            "fp4_dtype": element_type(quantizer.dtype),
            **self._tags(quantizer, shape),
        }
        kinds = (classes.nvfp4_storage, classes.nvfp4_tensor)
        return wrap(quantizer, buffers, self.attributes, fields, kinds, shape, dtype, device)

    def retag(self, quantizer: Any, tensor: Any) -> None:
        release().set_fields(tensor, **self._tags(quantizer, self.shape_of(tensor)))

    def _tags(self, quantizer: Any, shape: Sequence[int]) -> dict[str, Any]:
        """What a tensor says of its buffers."""
        option = release().option
        return {
            "with_gemm_swizzled_scales": self.swizzled(quantizer, shape),
            "row_scaled_nvfp4": row_scaled(quantizer),
            "nvfp4_use_4over6": four_over_six(quantizer),
            "nvfp4_e4m3_max": int(option(quantizer, "nvfp4_e4m3_max")),
        }

    def _encode_direction(
        self,
        quantizer: Any,
        direction: str,
        matrix: Tensor,
        specs: Mapping[str, BufferSpec],
        buffers: Buffers,
        shape: Sequence[int],
    ) -> None:
        """Quantise `matrix` along its rows, under the amax that is in `buffers`."""
        largest = buffers[f"_amax_{direction}"]
        square = bool(quantizer.with_2d_quantization)
        if four_over_six(quantizer):
            packed, scale = nvfp4_4over6.quantize(
                matrix,
                largest,
                square=square,
                e4m3_max=int(quantizer.nvfp4_e4m3_max),
                error_mode=quantizer.nvfp4_4over6_err_mode,
                fast_error=environment_flag("NVTE_NVFP4_4OVER6_ERR_USE_FAST_MATH"),
            )
        else:
            quantize = nvfp4.quantize_2d if square else nvfp4.quantize_1d
            packed, scale = quantize(
                matrix,
                largest,
                stochastic=bool(quantizer.stochastic_rounding),
                divided=release().nvfp4_divides,
            )
        if square:
            scale = scale.repeat_interleave(BLOCK, dim=0)
        padded = pad_to(scale, specs[f"_{direction}_scale_inv"][0])
        swizzled = self.swizzled(quantizer, shape)
        buffers[f"_{direction}_data"] = packed.view(specs[f"_{direction}_data"][0])
        buffers[f"_{direction}_scale_inv"] = swizzle(padded, columnwise=False) if swizzled else padded

    def swizzled(self, quantizer: Any, shape: Sequence[int]) -> bool:
        """Whether the kernel for this shape writes swizzled scales (`nvfp4_emits_gemm_swizzled_scales`)."""
        rule = release().nvfp4_swizzle
        option = release().option
        if rule is Nvfp4Swizzle.NEVER or not option(quantizer, "optimize_for_gemm"):
            return False
        if not 100 <= sm_arch() <= 110:
            return False
        m, k = flat_2d(shape)
        if quantizer.with_rht:
            return m % 64 == 0 and k % 128 == 0
        square = quantizer.with_2d_quantization and not row_scaled(quantizer)
        if rule is not Nvfp4Swizzle.HADAMARD_OR_SQUARE or not square:
            return False
        return not four_over_six(quantizer) and m % 128 == 0 and k % 128 == 0


def _amaxes(quantizer: Any, rows: Tensor, columns: Tensor) -> Buffers:
    """The amax buffers of these values, reduced over ranks where the quantizer asks for it."""
    found = {}
    usages = (quantizer.rowwise_usage, quantizer.columnwise_usage)
    rows, columns = rows.clone(), columns.clone()  # they may be one, and are reduced in place
    for name, used, largest in zip(AMAXES, usages, (rows, columns), strict=True):
        if not used:
            continue
        found[name] = largest
        if quantizer.with_amax_reduction:
            group = quantizer._canonicalized_amax_reduction_group()
            torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
    return found


def _direction(buffers: Buffers, direction: str, stochastic: bool) -> kernels.Nvfp4Direction | None:
    """Where the compiled kernels write a direction; None where it is not kept."""
    codes = buffers.get(f"_{direction}_data")
    if codes is None:
        return None
    key = int(fp4.random_key(codes.device).item()) if stochastic else 0
    scales, largest = buffers[f"_{direction}_scale_inv"], buffers[f"_amax_{direction}"]
    return kernels.Nvfp4Direction(codes, scales, largest, key)


NVFP4 = Nvfp4Scaling()
