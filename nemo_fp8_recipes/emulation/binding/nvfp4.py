"""NVFP4: E2M1 elements packed in pairs, E4M3 block scales, an amax instead of a tensor scale.

Follows `NVFP4Quantizer` in `pytorch/csrc/quantizer.cpp` and the kernels that it starts
(`cast/dispatch/quantize.cuh`, `hadamard_transform/`). Buffers: `_rowwise_data` [..., K/2],
`_rowwise_scale_inv` uint8 [M rounded up to 128, K/16 rounded up to 4], and of the transposed matrix
`_columnwise_data` [K, M/2], `_columnwise_scale_inv` [K rounded up to 128, M/16 rounded up to 4]; padding is
zero. `_amax_rowwise` and `_amax_columnwise` fp32 (1,), or one a row with row scaling. The Hadamard transform
is applied to columnwise data only, whose amax is then that of the transformed matrix. With the quantizer's
`optimize_for_gemm` the scales are in the GEMM's swizzled order where TE's fused kernels write them so.

Stochastic rounding draws from torch's default generator, as the device's generator does on a GPU; the bits
are others. Not emulated: what NVTE_USE_FAST_MATH changes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from nemo_fp8_recipes.emulation import kernels
from nemo_fp8_recipes.emulation.binding.checks import not_emulated, nvte_check, nvte_error
from nemo_fp8_recipes.emulation.binding.device import sm_arch
from nemo_fp8_recipes.emulation.binding.mxfp8 import TILE_K, TILE_M, swizzle
from nemo_fp8_recipes.emulation.binding.per_tensor import amax_of
from nemo_fp8_recipes.emulation.binding.releases import Nvfp4Swizzle, release
from nemo_fp8_recipes.emulation.binding.storage import SOURCE, Buffers, BufferSpec, flat_2d
from nemo_fp8_recipes.emulation.binding.te_classes import element_type, te_classes
from nemo_fp8_recipes.numerics import amax, fp4, hadamard, nvfp4, nvfp4_4over6

__all__ = ["NVFP4", "Nvfp4Scaling", "scale_shape"]

BLOCK = nvfp4.BLOCK
_DISPATCH = "common/cast/dispatch/quantize.cuh"
_TAGS = {torch.float32: 4, torch.float16: 5, torch.bfloat16: 6}


def scale_shape(m: int, k: int) -> tuple[int, int]:
    """Padded shape of the scales of an [m, k] matrix, blocks along k."""
    return (-(-m // TILE_M) * TILE_M, -(-(k // BLOCK) // TILE_K) * TILE_K)


class Nvfp4Scaling:
    """Storage of `NVFP4Quantizer`."""

    attributes: tuple[str, ...] = (
        "_rowwise_data",
        "_rowwise_scale_inv",
        "_columnwise_data",
        "_columnwise_scale_inv",
        "_amax_rowwise",
        "_amax_columnwise",
    )

    def specs(self, quantizer: Any, shape: Sequence[int]) -> dict[str, BufferSpec]:
        m, k = flat_2d(shape)
        got = f"(got shape={tuple(shape)})"
        nvte_check(m % BLOCK == 0, SOURCE, f"First dim for NVFP4 must be divisible by {BLOCK} {got}")
        nvte_check(k % BLOCK == 0, SOURCE, f"NVFP4 requires tensor dims that are divisible by {BLOCK} {got}")
        row_scaled = _row_scaled(quantizer)
        nvte_check(
            not row_scaled or quantizer.rowwise_usage,
            SOURCE,
            "Row-scaled NVFP4 quantization requires rowwise usage.",
        )
        specs: dict[str, BufferSpec] = {}
        if quantizer.rowwise_usage:
            specs["_rowwise_data"] = ((*shape[:-1], k // 2), torch.uint8)
            specs["_rowwise_scale_inv"] = (scale_shape(m, k), torch.uint8)
            specs["_amax_rowwise"] = ((m if row_scaled else 1,), torch.float32)
        if quantizer.columnwise_usage:
            specs["_columnwise_data"] = ((k, m // 2), torch.uint8)
            specs["_columnwise_scale_inv"] = (scale_shape(k, m), torch.uint8)
            specs["_amax_columnwise"] = ((k if row_scaled else 1,), torch.float32)
        return specs

    def shape_of(self, tensor: Any) -> tuple[int, ...]:
        nvte_check(
            isinstance(tensor, te_classes().nvfp4_storage),
            SOURCE,
            "NVFP4Quantizer must output to IsNVFP4Tensor.",
        )
        rowwise, columnwise = tensor._rowwise_data, tensor._columnwise_data
        nvte_check(rowwise is not None or columnwise is not None, SOURCE, "NVFP4Tensor has no data.")
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
        _require_supported(quantizer, x)
        matrix = x.view(flat_2d(x.shape))
        specs = self.specs(quantizer, x.shape)
        columns: Tensor | None = None
        largest: float | None = None
        if "_columnwise_data" in specs:
            columns, largest = _columns(quantizer, matrix)
        if amaxes is None:
            buffers = self._amaxes(quantizer, matrix, columns, largest, specs)
        else:
            buffers = {name: amax for name, amax in amaxes.items() if name in specs}
        if "_rowwise_data" in specs:
            self._direction(quantizer, "rowwise", matrix, specs, buffers, self.swizzled(quantizer, x.shape))
        if columns is not None:
            self._direction(
                quantizer, "columnwise", columns, specs, buffers, self.swizzled(quantizer, x.shape)
            )
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
        fields: dict[str, Any] = {name[1:]: buffers.get(name) for name in self.attributes}
        fields |= {
            "fp4_dtype": element_type(quantizer.dtype),
            "quantizer": quantizer,
            **self._tags(quantizer, shape),
        }
        if quantizer.internal:
            return classes.nvfp4_storage(**release().constructor(fields | {"fake_dtype": dtype}))
        fields |= {"shape": tuple(shape), "dtype": dtype, "device": device}
        return classes.nvfp4_tensor(**release().constructor(fields))

    def retag(self, quantizer: Any, tensor: Any) -> None:
        release().set_fields(tensor, **self._tags(quantizer, self.shape_of(tensor)))

    def _tags(self, quantizer: Any, shape: Sequence[int]) -> dict[str, Any]:
        """What a tensor says of its buffers."""
        option = release().option
        return {
            "with_gemm_swizzled_scales": self.swizzled(quantizer, shape),
            "row_scaled_nvfp4": _row_scaled(quantizer),
            "nvfp4_use_4over6": _four_over_six(quantizer),
            "nvfp4_e4m3_max": int(option(quantizer, "nvfp4_e4m3_max")),
        }

    def _amaxes(
        self,
        quantizer: Any,
        rows: Tensor,
        columns: Tensor | None,
        largest_of_columns: float | None,
        specs: Mapping[str, BufferSpec],
    ) -> Buffers:
        """The amax buffers. Without Hadamard transform and row scaling both directions have the same."""
        found: Buffers = {}
        each = 1 if _row_scaled(quantizer) else None
        if "_amax_rowwise" in specs:
            found["_amax_rowwise"] = (amax_of(rows) if each is None else amax(rows, dim=each)).view(-1)
        if columns is not None and largest_of_columns is not None and each is None:
            found["_amax_columnwise"] = torch.tensor([largest_of_columns])
        elif columns is not None and each is None and not quantizer.with_rht and "_amax_rowwise" in found:
            found["_amax_columnwise"] = found["_amax_rowwise"].clone()
        elif columns is not None:
            found["_amax_columnwise"] = (amax_of(columns) if each is None else amax(columns, dim=each)).view(
                -1
            )
        if quantizer.with_amax_reduction:
            group = quantizer._canonicalized_amax_reduction_group()
            for largest in found.values():
                torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
        return found

    def _direction(
        self,
        quantizer: Any,
        direction: str,
        matrix: Tensor,
        specs: Mapping[str, BufferSpec],
        buffers: Buffers,
        swizzled: bool,
    ) -> None:
        """Quantise one direction: `matrix` along its rows, under the amax that is in `buffers`."""
        stochastic = bool(quantizer.stochastic_rounding)
        four_over_six, divided = _four_over_six(quantizer), release().nvfp4_divides
        compiled = None if four_over_six or divided else kernels.for_tensor(matrix)
        if compiled is not None:
            data_shape, _ = specs[f"_{direction}_data"]
            packed = torch.empty(data_shape, dtype=torch.uint8)
            padded = torch.zeros(specs[f"_{direction}_scale_inv"][0], dtype=torch.uint8)
            compiled.nvfp4(
                matrix,
                buffers[f"_amax_{direction}"],
                kernels.Quantized(packed, padded),
                square=bool(quantizer.with_2d_quantization),
                swizzled=swizzled,
                random=fp4.random_bits(matrix) if stochastic else None,
            )
            buffers[f"_{direction}_data"] = packed
            buffers[f"_{direction}_scale_inv"] = padded
            return
        largest = buffers[f"_amax_{direction}"]
        if four_over_six:
            packed, scale = nvfp4_4over6.quantize(
                matrix,
                largest,
                square=bool(quantizer.with_2d_quantization),
                e4m3_max=int(quantizer.nvfp4_e4m3_max),
                error_mode=quantizer.nvfp4_4over6_err_mode,
                fast_error=_environment_flag("NVTE_NVFP4_4OVER6_ERR_USE_FAST_MATH"),
            )
        else:
            quantize = nvfp4.quantize_2d if quantizer.with_2d_quantization else nvfp4.quantize_1d
            packed, scale = quantize(matrix, largest, stochastic=stochastic, divided=divided)
        if quantizer.with_2d_quantization:
            scale = scale.repeat_interleave(BLOCK, dim=0)
        rows, columns = specs[f"_{direction}_scale_inv"][0]
        padded = pad(scale, (0, columns - scale.shape[1], 0, rows - scale.shape[0]))
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
        square = quantizer.with_2d_quantization and not _row_scaled(quantizer)
        if rule is not Nvfp4Swizzle.HADAMARD_OR_SQUARE or not square:
            return False
        return not _four_over_six(quantizer) and m % 128 == 0 and k % 128 == 0


def _row_scaled(quantizer: Any) -> bool:
    return bool(release().option(quantizer, "row_scaled_nvfp4"))


def _four_over_six(quantizer: Any) -> bool:
    return bool(release().option(quantizer, "nvfp4_use_4over6"))


def _columns(quantizer: Any, matrix: Tensor) -> tuple[Tensor, float | None]:
    """What columnwise data is quantised from: the transposed matrix, transformed where the quantizer asks for
    it; and its amax where that came on the way.
    """
    compiled = kernels.for_tensor(matrix)
    if not quantizer.with_rht:
        return (matrix.t().contiguous() if compiled is None else compiled.transpose(matrix)), None
    sign_mask = int(quantizer.rht_matrix_random_sign_mask_t)
    if compiled is not None:
        return compiled.hadamard_columns(matrix, sign_mask)
    return hadamard.random_hadamard_transform(matrix.t().contiguous(), sign_mask), None


def _require_supported(quantizer: Any, x: Tensor) -> None:
    """What TE's kernels refuse, in its words, and what is not emulated.

    Raises:
        RuntimeError: dtypes and combinations of options that TE has no kernel for.
        NotImplementedError: fast math, square blocks together with the Hadamard transform.
    """
    if sm_arch() < 100:
        nvte_error(_DISPATCH, "NVFP4 quantization needs compute capability 10.0 or later.")
    e4m3_max = release().option(quantizer, "nvfp4_e4m3_max")
    nvte_check(e4m3_max in (256, 448), SOURCE, f"Unsupported NVFP4 E4M3 max: {e4m3_max}")
    if _four_over_six(quantizer):
        _require_4over6(quantizer)
    else:
        nvte_check(e4m3_max == 448, _DISPATCH, "Non-4over6 NVFP4 quantization requires E4M3 max 448.")
    if _environment_flag("NVTE_USE_FAST_MATH") and not _four_over_six(quantizer):
        not_emulated("quantize with NVFP4Quantizer and NVTE_USE_FAST_MATH", "Unset NVTE_USE_FAST_MATH.")
    if _row_scaled(quantizer):
        _require_row_scaled(quantizer, x)
    columns_alone = quantizer.columnwise_usage and not quantizer.rowwise_usage
    nvte_check(
        not (columns_alone and quantizer.with_2d_quantization) or release().nvfp4_square_columns_alone,
        "common/transpose/quantize_transpose_vector_blockwise_fp4.cu",
        "2D block quantization is only supported when return_identity is true.",
    )
    if not quantizer.with_rht:
        return
    if x.dtype != torch.bfloat16:
        nvte_error(
            SOURCE,
            f"RHT is only supported for bfloat16 input, got dtype enum value {_TAGS.get(x.dtype, x.dtype)}",
        )
    if not quantizer.with_post_rht_amax:
        nvte_error(SOURCE, "Pre-RHT amax is not supported yet. Use with_post_rht_amax=true instead.")
    if quantizer.with_2d_quantization:
        not_emulated("quantize with NVFP4Quantizer(with_rht=True, with_2d_quantization=True)")


def _require_4over6(quantizer: Any) -> None:
    mode = quantizer.nvfp4_4over6_err_mode
    nvte_check(mode in ("MAE", "MSE"), SOURCE, f"Unsupported NVFP4 4over6 error mode: {mode}")
    for option, what in (("with_rht", "RHT"), ("stochastic_rounding", "stochastic rounding")):
        nvte_check(
            not getattr(quantizer, option), SOURCE, f"NVFP4 4over6 quantization does not support {what}."
        )
    nvte_check(
        not (quantizer.row_scaled_nvfp4 and quantizer.columnwise_usage),
        _DISPATCH,
        "Row-scaled NVFP4 transpose quantization is not supported with 4over6 mode. The 4over6 kernel does "
        "not consume the per-row/per-column amaxes, so the columnwise output would be incorrect.",
    )
    nvte_check(
        not quantizer.with_2d_quantization or quantizer.rowwise_usage,
        "common/cast/nvfp4/quantize_4over6_nvfp4.cuh",
        "NVFP4 4over6 2D quantization requires rowwise output.",
    )


def _environment_flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def _require_row_scaled(quantizer: Any, x: Tensor) -> None:
    for option, what in (
        ("with_rht", "RHT"),
        ("with_2d_quantization", "2D quantization"),
        ("stochastic_rounding", "stochastic rounding"),
        ("with_amax_reduction", "amax reduction"),
    ):
        nvte_check(
            not getattr(quantizer, option), SOURCE, f"Row-scaled NVFP4 quantization does not support {what}."
        )
    m, k = flat_2d(x.shape)
    nvte_check(
        not quantizer.columnwise_usage or release().nvfp4_row_scaled_columns,
        SOURCE,
        "Row-scaled NVFP4 quantization does not support columnwise usage.",
    )
    nvte_check(
        not quantizer.columnwise_usage or (x.dtype == torch.bfloat16 and m % 32 == 0 and k % 32 == 0),
        _DISPATCH,
        "Row-scaled NVFP4 transpose quantization requires BF16 input and dimensions that are "
        "multiples of 32.",
    )


NVFP4 = Nvfp4Scaling()
