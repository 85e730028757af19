"""FP8 block scaling: 1x128 and 128x128 blocks with fp32 scales, in the layouts that the Hopper GEMM reads.

Follows `Float8BlockQuantizer` in `pytorch/csrc/quantizer.cpp` and
`common/transpose/quantize_transpose_{vector,square}_ blockwise.cu`. For an [M, K] matrix:

    _rowwise_data          [.., K], shape of the tensor
    _columnwise_data       [K, ..], transposed: the last dimension in front
    _rowwise_scale_inv     1D: [ceil(K/128), M rounded up to 4]; 2D: [ceil(M/128), ceil(K/128) rounded up to
    4] _columnwise_scale_inv  1D: [ceil(M/128), K rounded up to 4]; 2D: [ceil(K/128), ceil(M/128) rounded up
    to 4]

1D columnwise data is quantised again from high precision, 2D is the same codes transposed. Padding is zero.

Transformer Engine 2.11 gathers 1D data over ranks in a compact format, which a quantizer with
`all_gather_usage` makes: `_columnwise_data` in the shape of the tensor, `_rowwise_scale_inv` [M,
ceil(K/128)], `_columnwise_scale_inv` [ceil(M/128), K].
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
from nemo_fp8_recipes.emulation.binding.dtypes import fp8_format
from nemo_fp8_recipes.emulation.binding.enums import enums_of
from nemo_fp8_recipes.emulation.binding.releases import release
from nemo_fp8_recipes.emulation.binding.storage import (
    SOURCE,
    Buffers,
    BufferSpec,
    allocate,
    direction_of,
    flat_2d,
    transposed_shape,
)
from nemo_fp8_recipes.emulation.binding.te_classes import element_type, te_classes
from nemo_fp8_recipes.numerics import blockwise

__all__ = ["BLOCKWISE", "BlockScaling"]

BLOCK = blockwise.BLOCK


def _scale_shape(m: int, k: int, dim: int) -> tuple[int, int]:
    """Rowwise scales of an [m, k] matrix; the columnwise ones are those of [k, m]."""
    rows, columns = -(-m // BLOCK), -(-k // BLOCK)
    return (rows, round_up(columns, 4)) if dim == 2 else (columns, round_up(m, 4))


def _compact_scale_shape(m: int, k: int, *, columnwise: bool) -> tuple[int, int]:
    """Scales of an [m, k] matrix in the compact format."""
    return (-(-m // BLOCK), k) if columnwise else (m, -(-k // BLOCK))


def _compact(quantizer: Any) -> bool:
    """Whether the quantizer makes the compact format.

    Raises:
        RuntimeError: of 128x128 blocks, in TE's words.
    """
    compact = bool(release().option(quantizer, "all_gather_usage"))
    nvte_check(
        not compact or quantizer.block_scaling_dim == 1, SOURCE, "2D scaling is always GEMM_READY for now."
    )
    return compact


def _data_format(*, compact: bool) -> Any:
    """Member of the enum that tensors of releases with a compact format carry."""
    return enums_of(release().name)["Float8BlockScaleTensorFormat"]["COMPACT" if compact else "GEMM_READY"]


def _is_compact(tensor: Any) -> bool:
    return release().compact_blockwise and tensor._data_format == _data_format(compact=True)


def _pad_to_four(scale: Tensor) -> Tensor:
    return pad_to(scale, (scale.shape[0], round_up(scale.shape[1], 4)))


class BlockScaling:
    """Storage of `Float8BlockQuantizer`."""

    attributes: tuple[str, ...] = ATTRIBUTES

    def specs(self, quantizer: Any, shape: Sequence[int]) -> dict[str, BufferSpec]:
        dim = quantizer.block_scaling_dim
        nvte_check(dim in (1, 2), SOURCE, "Unsupported block scaling dim.")
        m, k = flat_2d(shape)
        compact = _compact(quantizer)
        rowwise_scale, columnwise_scale = _scale_shape(m, k, dim), _scale_shape(k, m, dim)
        if compact:
            rowwise_scale = _compact_scale_shape(m, k, columnwise=False)
            columnwise_scale = _compact_scale_shape(m, k, columnwise=True)
        specs: dict[str, BufferSpec] = {}
        if quantizer.rowwise_usage:
            specs["_rowwise_data"] = (tuple(shape), torch.uint8)
            specs["_rowwise_scale_inv"] = (rowwise_scale, torch.float32)
        if quantizer.columnwise_usage:
            specs["_columnwise_data"] = (tuple(shape) if compact else transposed_shape(shape), torch.uint8)
            specs["_columnwise_scale_inv"] = (columnwise_scale, torch.float32)
        return specs

    def shape_of(self, tensor: Any) -> tuple[int, ...]:
        refusal = f"Float8BlockQuantizer must output to Float8BlockwiseQTensor, got {type(tensor).__name__}."
        rowwise, columnwise = data_of(tensor, te_classes().blockwise_storage, refusal, "FP8BlockwiseTensor")
        if _is_compact(tensor):
            return tuple((columnwise if rowwise is None else rowwise).shape)
        if rowwise is None:
            return (*columnwise.shape[1:], *columnwise.shape[:1])
        shape = tuple(rowwise.shape)
        nvte_check(
            columnwise is None or tuple(columnwise.shape) == transposed_shape(shape),
            SOURCE,
            f"BlockwiseFP8 row-wise data (shape={shape}) and column-wise data "
            f"(shape={None if columnwise is None else tuple(columnwise.shape)}) do not match",
        )
        return shape

    def encode(self, quantizer: Any, x: Tensor) -> Buffers:
        fmt = fp8_format(quantizer.dtype)
        power_of_two = bool(quantizer.force_pow_2_scales)
        nvte_check(
            power_of_two or sm_arch() < 100,
            "common/transpose/quantize_transpose_square_blockwise.cu",
            "On Blackwell and newer, the FP8 block scaling recipe is emulated "
            "with MXFP8, which requires using power of two scaling factors.",
        )
        epsilon = float(quantizer.amax_epsilon)
        matrix = x.view(flat_2d(x.shape))
        compact = _compact(quantizer)
        compiled = kernels.for_tensor(x)
        if compiled is not None and not compact:
            buffers = allocate(self, quantizer, x.shape, x.device, zero_scales=True)
            compiled.blockwise(
                matrix,
                fmt,
                direction_of(buffers, "rowwise"),
                direction_of(buffers, "columnwise"),
                square=quantizer.block_scaling_dim == 2,
                epsilon=epsilon,
                power_of_two=power_of_two,
            )
            return buffers
        specs = self.specs(quantizer, x.shape)
        buffers = {}
        if quantizer.block_scaling_dim == 2:
            codes, scale_inv = blockwise.quantize_2d(matrix, fmt, epsilon=epsilon, power_of_two=power_of_two)
            if "_rowwise_data" in specs:
                buffers["_rowwise_data"] = codes.view(x.shape)
                buffers["_rowwise_scale_inv"] = _pad_to_four(scale_inv)
            if "_columnwise_data" in specs:
                buffers["_columnwise_data"] = codes.t().contiguous().view(specs["_columnwise_data"][0])
                buffers["_columnwise_scale_inv"] = _pad_to_four(scale_inv.t())
            return buffers
        if "_rowwise_data" in specs:
            codes, scale_inv = blockwise.quantize_1d(matrix, fmt, epsilon=epsilon, power_of_two=power_of_two)
            buffers["_rowwise_data"] = codes.view(x.shape)
            buffers["_rowwise_scale_inv"] = scale_inv if compact else _pad_to_four(scale_inv.t())
        if "_columnwise_data" in specs:
            codes, scale_inv = blockwise.quantize_1d_columnwise(
                matrix, fmt, epsilon=epsilon, power_of_two=power_of_two
            )
            lying = codes if compact else codes.t()
            buffers["_columnwise_data"] = lying.contiguous().view(specs["_columnwise_data"][0])
            buffers["_columnwise_scale_inv"] = scale_inv if compact else _pad_to_four(scale_inv)
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
            "fp8_dtype": element_type(quantizer.dtype),
            "is_2D_scaled": quantizer.block_scaling_dim == 2,
            "data_format": _data_format(compact=_compact(quantizer)),
        }
        kinds = (classes.blockwise_storage, classes.blockwise_tensor)
        return wrap(quantizer, buffers, self.attributes, fields, kinds, shape, dtype, device)

    def retag(self, quantizer: Any, tensor: Any) -> None:
        """The C++ keeps the tensor's own format and block dimension."""


BLOCKWISE = BlockScaling()
