"""GEMM operands: which buffers of a tensor a GEMM reads, and the fp32 values in them.

Follows `CanonicalizeGemmInput` in `common/gemm/cublaslt_gemm.cu` of Transformer Engine. An operand is read
along rows (as it lies) or along columns (as its transpose); a quantised tensor has separate data for the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation import kernels
from nemo_fp8_recipes.emulation.binding.blockwise import BLOCK, BLOCKWISE
from nemo_fp8_recipes.emulation.binding.checks import not_emulated, nvte_check
from nemo_fp8_recipes.emulation.binding.device import non_tn_fp8_gemm_supported
from nemo_fp8_recipes.emulation.binding.dtypes import (
    element_format,
    fp8_format,
    require_high_precision,
    short_name,
)
from nemo_fp8_recipes.emulation.binding.mxfp8 import BLOCK as MX_BLOCK
from nemo_fp8_recipes.emulation.binding.mxfp8 import MXFP8, unswizzle
from nemo_fp8_recipes.emulation.binding.nvfp4 import NVFP4
from nemo_fp8_recipes.emulation.binding.releases import release
from nemo_fp8_recipes.emulation.binding.storage import flat_2d
from nemo_fp8_recipes.emulation.binding.te_classes import te_classes
from nemo_fp8_recipes.numerics import nvfp4
from nemo_fp8_recipes.numerics.blocks import dequantize_blocks
from nemo_fp8_recipes.numerics.cast import decode
from nemo_fp8_recipes.numerics.e8m0 import e8m0_to_fp32
from nemo_fp8_recipes.numerics.formats import Fp8Format

__all__ = ["NVFP4_SCALING", "PER_TENSOR", "Operand", "operand", "values"]

GEMM_SOURCE = "common/gemm/cublaslt_gemm.cu"

PER_TENSOR = "tensorwise-or-delayed"
NVFP4_SCALING = "nvfp4"


@dataclass(frozen=True)
class Operand:
    """A tensor as one GEMM reads it.

    Attributes:
        name: "A" or "B".
        tensor: the tensor.
        columnwise: read along columns.
        shape: logical shape of the tensor.
        format: "e4m3", "e5m2", "e2m1", "fp32", "bf16", "fp16".
        scaling: "none", "tensorwise-or-delayed", "mxfp8", "nvfp4", "block_1d", "block_2d".
    """

    name: str
    tensor: Any
    columnwise: bool
    shape: tuple[int, ...]
    format: str
    scaling: str

    @property
    def quantized(self) -> bool:
        return self.scaling != "none"

    @property
    def usage(self) -> str:
        return "columnwise" if self.columnwise else "rowwise"

    def matrix(self) -> tuple[Tensor, Tensor | None]:
        """fp32 matrix [rows, columns] in logical orientation (a view where that saves a transpose), and an
        fp32 factor (1,) that the product is still to be multiplied with: per-tensor scales are applied after
        the sum, as cuBLAS does. For NVFP4 it is the amax, from which `gemm_scale` makes the factor of both.
        """
        if not self.quantized:
            return self.tensor.detach().reshape(flat_2d(self.shape)).to(torch.float32), None
        if self.scaling == PER_TENSOR:
            return _per_tensor_codes(self.tensor, self.columnwise), self.tensor._scale_inv.detach()
        if self.scaling == NVFP4_SCALING:
            packed, scale, largest = _nvfp4_buffers(self.tensor, self.columnwise)
            compiled = kernels.for_codes(packed)
            swizzled = bool(release().field(self.tensor, "with_gemm_swizzled_scales"))
            if compiled is not None and scale.is_contiguous():
                matrix = compiled.decode_nvfp4(packed, scale, swizzled=swizzled)
            else:
                matrix = nvfp4.block_values(packed, _nvfp4_scales(packed, scale, swizzled=swizzled))
            return matrix.t() if self.columnwise else matrix, largest
        return values(self.tensor, columnwise=self.columnwise), None


def operand(name: str, tensor: Any, *, columnwise: bool) -> Operand:
    """Look at a GEMM input.

    Raises:
        RuntimeError: the data of the direction that this GEMM reads is missing, in TE's words.
        NotImplementedError: a format that is not emulated.
    """
    classes = te_classes()
    if not isinstance(tensor, classes.quantized_storage):
        require_high_precision(tensor)
        return Operand(name, tensor, columnwise, tuple(tensor.shape), short_name(tensor.dtype), "none")
    direction = "column-wise" if columnwise else "row-wise"
    missing = f"Input {name} is missing {direction} usage"
    if isinstance(tensor, classes.float8_storage):
        has_rows = tensor._data is not None
        has_columns = tensor._transpose is not None and not tensor._transpose_invalid
        nvte_check(has_rows or has_columns, GEMM_SOURCE, f"Input {name} does not hold any data!")
        readable = has_rows or has_columns
        if not non_tn_fp8_gemm_supported():
            readable = has_columns if columnwise else has_rows
        nvte_check(readable, GEMM_SOURCE, missing)
        shape = tuple(tensor._data.shape) if has_rows else _untransposed(tensor._transpose.shape)
        scaling = PER_TENSOR
    elif isinstance(tensor, classes.mxfp8_storage):
        data = tensor._columnwise_data if columnwise else tensor._rowwise_data
        nvte_check(data is not None, GEMM_SOURCE, missing)
        shape, scaling = MXFP8.shape_of(tensor), "mxfp8"
    elif isinstance(tensor, classes.blockwise_storage):
        data = tensor._columnwise_data if columnwise else tensor._rowwise_data
        nvte_check(data is not None, GEMM_SOURCE, missing)
        shape, scaling = BLOCKWISE.shape_of(tensor), "block_2d" if tensor._is_2D_scaled else "block_1d"
    elif isinstance(tensor, classes.nvfp4_storage):
        nvte_check(
            not release().field(tensor, "row_scaled_nvfp4"),
            GEMM_SOURCE,
            "cuBLAS GEMM does not support row-scaled NVFP4 inputs.",
        )
        data = tensor._columnwise_data if columnwise else tensor._rowwise_data
        nvte_check(data is not None, GEMM_SOURCE, missing)
        shape = NVFP4.shape_of(tensor)
        return Operand(name, tensor, columnwise, shape, element_format(tensor._fp4_dtype), NVFP4_SCALING)
    else:
        not_emulated(f"generic_gemm with {type(tensor).__name__}")
    return Operand(name, tensor, columnwise, shape, fp8_format(tensor._fp8_dtype).name, scaling)


def values(tensor: Any, *, columnwise: bool) -> Tensor:
    """fp32 values [rows, columns] of a quantised tensor in logical orientation, from the data of one
    direction.
    """
    classes = te_classes()
    if isinstance(tensor, classes.nvfp4_storage):
        packed, scale, largest = _nvfp4_buffers(tensor, columnwise)
        field = release().field
        swizzled = bool(field(tensor, "with_gemm_swizzled_scales"))
        scale = _nvfp4_scales(packed, scale, swizzled=swizzled)
        dequantized = nvfp4.dequantize(packed, scale, largest, e4m3_max=field(tensor, "nvfp4_e4m3_max"))
        return dequantized.t() if columnwise else dequantized
    fmt = fp8_format(tensor._fp8_dtype)
    if isinstance(tensor, classes.float8_storage):
        return _per_tensor_codes(tensor, columnwise).mul(tensor._scale_inv.detach())
    if isinstance(tensor, classes.mxfp8_storage):
        codes = tensor._columnwise_data if columnwise else tensor._rowwise_data
        scale = tensor._columnwise_scale_inv if columnwise else tensor._rowwise_scale_inv
        swizzled = bool(release().field(tensor, "with_gemm_swizzled_scales"))
        compiled = kernels.for_codes(codes)
        if compiled is not None and scale.is_contiguous():
            return compiled.decode_mxfp8(
                codes.view(flat_2d(codes.shape)),
                scale,
                fmt,
                columnwise=columnwise,
                swizzled=swizzled,
            )
        if swizzled:
            scale = unswizzle(scale, columnwise=columnwise)
        m, k = flat_2d(codes.shape)
        block = (MX_BLOCK, 1) if columnwise else (1, MX_BLOCK)
        scale = scale[: m // block[0], : k // block[1]]
        return dequantize_blocks(codes.reshape(m, k), e8m0_to_fp32(scale), fmt, block)
    # Block scaling: columnwise data is that of the transposed matrix.
    codes = tensor._columnwise_data if columnwise else tensor._rowwise_data
    scale = tensor._columnwise_scale_inv if columnwise else tensor._rowwise_scale_inv
    if columnwise:
        codes = codes.reshape(codes.shape[0], -1)
    else:
        codes = codes.reshape(flat_2d(codes.shape))
    m, k = codes.shape
    compiled = kernels.for_codes(codes)
    if compiled is not None and scale.is_contiguous():
        matrix = compiled.decode_blockwise(codes, scale, fmt, square=bool(tensor._is_2D_scaled))
        return matrix.t() if columnwise else matrix
    if tensor._is_2D_scaled:
        block, natural = (BLOCK, BLOCK), scale[:, : -(-k // BLOCK)]
    else:
        block, natural = (1, BLOCK), scale[:, :m].t()
    matrix = dequantize_blocks(codes, natural, fmt, block)
    return matrix.t() if columnwise else matrix


def _nvfp4_buffers(tensor: Any, columnwise: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes [rows, columns / 2], their scales as they are stored and their amax; columnwise those of
    the transposed matrix.
    """
    direction = "columnwise" if columnwise else "rowwise"
    packed = getattr(tensor, f"_{direction}_data")
    scale = getattr(tensor, f"_{direction}_scale_inv")
    largest = getattr(tensor, f"_amax_{direction}")
    nvte_check(largest is not None, "common/recipe/nvfp4.cu", "amax_ptr is null")
    packed = packed.reshape(packed.shape[0], -1) if columnwise else packed.reshape(flat_2d(packed.shape))
    return packed, scale, largest.detach()


def _nvfp4_scales(packed: Tensor, stored: Tensor, *, swizzled: bool) -> Tensor:
    """Scales of the packed codes in natural order, without padding."""
    natural = unswizzle(stored, columnwise=False) if swizzled else stored
    return natural[: packed.shape[0], : packed.shape[1] * 2 // nvfp4.BLOCK]


def _untransposed(shape: torch.Size) -> tuple[int, ...]:
    return (*shape[1:], *shape[:1])


def _per_tensor_codes(tensor: Any, columnwise: bool) -> Tensor:
    """fp32 values of the codes, scale not applied."""
    fmt = fp8_format(tensor._fp8_dtype)
    data, transpose = tensor._data, tensor._transpose
    if transpose is not None and not tensor._transpose_invalid and (columnwise or data is None):
        flat = transpose.reshape(transpose.shape[0] if transpose.dim() else 1, -1)
        return _decode(flat, fmt).t()
    return _decode(data.reshape(flat_2d(data.shape)), fmt)


def _decode(codes: Tensor, fmt: Fp8Format) -> Tensor:
    compiled = kernels.for_codes(codes)
    return decode(codes, fmt) if compiled is None else compiled.decode(codes, fmt)
