"""Which groups the kernels of Transformer Engine quantise, and dequantise.

Follows `group_quantize_nvfp4_impl` in `pytorch/csrc/extensions/cast.cpp`, and in `common/`
`cast/dispatch/dequantize.cuh`, `cast/mxfp8/group_(de)quantize_mxfp8.cuh`, `cast/core/grouped_layout.cuh`,
`cast/fp8/group_quantize_fp8.cuh`, `cast/fp8_blockwise/group_(de)quantize_fp8_blockwise.cuh` and
`hadamard_transform/graph_safe_group_row_cast_col_hadamard_transform_cast_fusion.cu`. What a kernel finds out
on the device ends a program on a GPU (`NVTE_DEVICE_ERROR`); here it is an error like the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemo_fp8_recipes.emulation.binding.blockwise import BLOCKWISE
from nemo_fp8_recipes.emulation.binding.checks import nvte_check, nvte_error
from nemo_fp8_recipes.emulation.binding.device import sm_arch
from nemo_fp8_recipes.emulation.binding.grouped_layout import Group
from nemo_fp8_recipes.emulation.binding.mxfp8 import MXFP8
from nemo_fp8_recipes.emulation.binding.nvfp4 import NVFP4
from nemo_fp8_recipes.emulation.binding.per_tensor import CURRENT
from nemo_fp8_recipes.emulation.binding.releases import release
from nemo_fp8_recipes.emulation.binding.storage import Layout
from nemo_fp8_recipes.emulation.binding.te_classes import te_classes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["check_dequantizable", "check_quantizable"]

CAST = "pytorch/csrc/extensions/cast.cpp"
DEQUANTIZE = "common/cast/dispatch/dequantize.cuh"
GROUPS = "common/cast/core/grouped_layout.cuh"
TILE = 128
MOST = 64
"""Members that the kernels have room for, of those that have to be told apart."""


def check_quantizable(layout: Layout, quantizer: Any, group: Group, x: Tensor) -> None:
    """That there is a kernel for this group.

    Args:
        layout: of the members.
        quantizer: of the group.
        group: the members.
        x: all of them, not empty.

    Raises:
        RuntimeError: there is none, in TE's words.
    """
    if layout is NVFP4:
        _check_nvfp4(quantizer, group)
    elif layout is MXFP8:
        _check_mxfp8(group)
    elif layout is BLOCKWISE:
        _check_blockwise(group)
    elif layout is CURRENT:
        _check_per_tensor(quantizer, group, x)


def check_dequantizable(grouped: Any, group: Group) -> None:
    """That there is a kernel that dequantises this group, which is not empty.

    Raises:
        RuntimeError: there is none, in TE's words.
    """
    classes = te_classes()
    kind = type(grouped.quantizer)
    if kind is classes.mxfp8_quantizer:
        _check_mxfp8_values(grouped, group)
    elif kind is classes.blockwise_quantizer and release().groups_of_every_format:
        _check_blockwise_values(grouped, group)
    else:
        nvfp4 = kind is classes.nvfp4_quantizer
        mode = "NVTE_NVFP4_1D_SCALING" if nvfp4 else "NVTE_DELAYED_TENSOR_SCALING"
        nvte_error(DEQUANTIZE, f"Grouped dequantize not implemented for scaling mode: {mode}.")


def _both(grouped: Any) -> bool:
    return grouped.rowwise_data is not None and grouped.columnwise_data is not None


def _check_mxfp8_values(grouped: Any, group: Group) -> None:
    source = "common/cast/mxfp8/group_dequantize_mxfp8.cuh"
    if sm_arch() < 100:
        nvte_error(DEQUANTIZE, "MXFP8 Grouped Dequantization is NOT supported by architectures < 10.0")
    nvte_check(
        not _both(grouped),
        source,
        "Dequantize only supports rowwise or columnwise scaling, not both simultaneously.",
    )
    nvte_check(not grouped._with_gemm_swizzled_scales, source, "Input must have scales in compact format.")
    _check_descriptors(group, source)
    nvte_check(
        group.last_dims is None or group.logical[1] % TILE == 0,
        source,
        "Last dimension of a grouped tensor should be divisible by 128.",
    )


def _check_blockwise_values(grouped: Any, group: Group) -> None:
    source = "common/cast/fp8_blockwise/group_dequantize_fp8_blockwise.cuh"
    nvte_check(
        90 <= sm_arch() < 100,
        source,
        f"Grouped FP8 block-scaling dequantize is only supported on Hopper (SM90-SM99); got SM{sm_arch()}.",
    )
    nvte_check(
        not _both(grouped),
        source,
        "Grouped FP8 block-scaling dequantize accepts exactly one direction at a time (not both rowwise and "
        "columnwise simultaneously).",
    )
    nvte_check(
        group.last_dims is None,
        source,
        "Grouped FP8 block-scaling dequantize supports only SAME_BOTH_DIMS and VARYING_FIRST_DIM shape "
        "representations.",
    )
    nvte_check(
        group.logical[1] % TILE == 0,
        source,
        f"Last dim must be a multiple of 128 for FP8 block-scaling dequantize (got {group.logical[1]}).",
    )


def _check_nvfp4(quantizer: Any, group: Group) -> None:
    option = release().option
    nvte_check(not quantizer.with_2d_quantization, CAST, "2D scaling grouped quant kernel is not ready yet")
    nvte_check(
        not option(quantizer, "nvfp4_use_4over6"),
        CAST,
        "NVFP4 4over6 quantization is not supported for grouped quantization.",
    )
    nvte_check(
        bool(quantizer.with_rht), CAST, "graph safe grouped quant kernel for non-RHT path is not ready yet"
    )
    nvte_check(
        bool(quantizer.with_post_rht_amax),
        CAST,
        "grouped NVFP4 RHT quantization expects post-RHT amax buffers.",
    )
    source = "common/hadamard_transform/graph_safe_group_row_cast_col_hadamard_transform_cast_fusion.cu"
    for size, name in zip(group.logical, ("First", "Last"), strict=True):
        nvte_check(
            size % TILE == 0, source, f"{name} dimension of a grouped tensor should be divisible by 128."
        )
    nvte_check(len(group.shapes) <= MOST, source, f"Number of tensors should be less than or equal to {MOST}")
    _check_rows(group)


def _check_mxfp8(group: Group) -> None:
    source = "common/cast/mxfp8/group_quantize_mxfp8.cuh"
    _check_descriptors(group, source)
    nvte_check(
        group.logical[0] % TILE == 0 or (group.first_dims is not None and group.last_dims is not None),
        source,
        "First logical dimension of a grouped tensor must be divisible by 128.",
    )
    _check_rows(group)
    nvte_check(
        group.last_dims is None or all(columns % TILE == 0 for _, columns in group.shapes),
        GROUPS,
        "For varying last dimensions support, the last dimension of each tensor in a group must be "
        "divisible by 128.",
    )


def _check_descriptors(group: Group, source: str) -> None:
    """Of members that differ in columns, each has a descriptor of its own."""
    nvte_check(
        group.last_dims is None or len(group.shapes) <= MOST,
        source,
        f"Number of tensors in a group is larger than the MAX number of supported descriptors ({MOST}).",
    )


def _check_rows(group: Group) -> None:
    """Of members that differ; those of one shape are quantised as one matrix."""
    nvte_check(
        group.uniform or all(rows % TILE == 0 for rows, _ in group.shapes),
        GROUPS,
        "First dimension of each tensor in a group must be divisible by 128.",
    )


def _check_blockwise(group: Group) -> None:
    source = "common/cast/fp8_blockwise/group_quantize_fp8_blockwise.cuh"
    nvte_check(
        90 <= sm_arch() < 100,
        source,
        "Grouped FP8 block-scaling quantize is only supported on Hopper (SM90-SM99); use MXFP8 on "
        f"Blackwell (SM100) or newer. Got SM{sm_arch()}.",
    )
    nvte_check(
        group.last_dims is None,
        source,
        "Grouped FP8 block-scaling supports only SAME_BOTH_DIMS and VARYING_FIRST_DIM shape representations.",
    )
    nvte_check(
        group.logical[1] % 16 == 0,
        source,
        "Last dim must be a multiple of TMA_GMEM_ALIGNMENT (16) for FP8 alignment.",
    )
    aligned = all(rows % TILE == 0 for rows, _ in group.shapes)
    nvte_check(aligned or not group.uniform, source, "SAME_BOTH_DIMS first dim must be multiple of 128.")
    nvte_check(
        aligned,
        source,
        "Grouped FP8 block-scaling quantize: each tensor's first dimension must be a multiple of 128 "
        "(VARYING_FIRST_DIM).",
    )


def _check_per_tensor(quantizer: Any, group: Group, x: Tensor) -> None:
    source = "common/cast/fp8/group_quantize_fp8.cuh"
    if group.uniform:
        nvte_check(
            group.logical[0] % len(group.shapes) == 0,
            source,
            "First logical dimension must be divisible by num_tensors.",
        )
    columnwise = "_transpose" in CURRENT.specs(quantizer, group.logical)
    if group.first_dims is not None and not columnwise:
        vector = 32 // x.element_size()
        nvte_check(
            group.logical[1] % vector == 0,
            source,
            "Varying first-dimension rowwise grouped FP8 quantization requires vector-aligned inputs: the "
            f"last logical dimension must be a multiple of {vector} and the input/output base pointers must "
            "be vector aligned.",
        )
