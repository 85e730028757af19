"""NVFP4: the options of a quantizer, and what TE's kernels refuse of them.

Follows the checks of `NVFP4Quantizer` in `pytorch/csrc/quantizer.cpp` and of the kernels that it starts.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.binding.checks import not_emulated, nvte_check, nvte_error
from nemo_fp8_recipes.emulation.binding.device import sm_arch
from nemo_fp8_recipes.emulation.binding.releases import release
from nemo_fp8_recipes.emulation.binding.storage import SOURCE, flat_2d

__all__ = ["environment_flag", "four_over_six", "require_supported", "row_scaled"]

_DISPATCH = "common/cast/dispatch/quantize.cuh"
_TAGS = {torch.float32: 4, torch.float16: 5, torch.bfloat16: 6}


def row_scaled(quantizer: Any) -> bool:
    return bool(release().option(quantizer, "row_scaled_nvfp4"))


def four_over_six(quantizer: Any) -> bool:
    return bool(release().option(quantizer, "nvfp4_use_4over6"))


def environment_flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def require_supported(quantizer: Any, x: Tensor) -> None:
    """What TE's kernels refuse, in its words, and what is not emulated.

    Raises:
        RuntimeError: dtypes and combinations of options that TE has no kernel for.
        NotImplementedError: fast math, square blocks together with the Hadamard transform.
    """
    if sm_arch() < 100:
        nvte_error(_DISPATCH, "NVFP4 quantization needs compute capability 10.0 or later.")
    e4m3_max = release().option(quantizer, "nvfp4_e4m3_max")
    nvte_check(e4m3_max in (256, 448), SOURCE, f"Unsupported NVFP4 E4M3 max: {e4m3_max}")
    if four_over_six(quantizer):
        _require_4over6(quantizer)
    else:
        nvte_check(e4m3_max == 448, _DISPATCH, "Non-4over6 NVFP4 quantization requires E4M3 max 448.")
    if environment_flag("NVTE_USE_FAST_MATH") and not four_over_six(quantizer):
        not_emulated("quantize with NVFP4Quantizer and NVTE_USE_FAST_MATH", "Unset NVTE_USE_FAST_MATH.")
    if row_scaled(quantizer):
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
