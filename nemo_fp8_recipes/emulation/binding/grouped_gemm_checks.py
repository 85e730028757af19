"""What Transformer Engine refuses of a grouped GEMM.

Follows `validate_grouped_gemm_*` and `launch_grouped_bias_add` in `common/gemm/cublaslt_grouped_gemm.cu` and
`prepare_grouped_gemm_config` in `pytorch/csrc/extensions/gemm.cpp`. The sizes of the matrices are on the
device, so TE looks at none of them; cuBLAS' own limits on them are checked like those of a single GEMM
(`gemm_problem.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.binding.checks import nvte_check, nvte_error
from nemo_fp8_recipes.emulation.binding.device import sm_arch
from nemo_fp8_recipes.emulation.binding.grouped_operands import CUBLAS, MOST_MATRICES, Matrices, group_members
from nemo_fp8_recipes.emulation.binding.operands import NVFP4_SCALING
from nemo_fp8_recipes.emulation.binding.releases import release

__all__ = [
    "GEMM",
    "check_amax",
    "check_bias",
    "check_counts",
    "check_device",
    "check_factors",
    "check_operands",
    "check_outputs",
    "check_scalings",
    "check_workspaces",
    "one_factor_a_matrix",
    "setup_workspace_size",
]

GEMM = "pytorch/csrc/extensions/gemm.cpp"
_CUBLAS_WORKSPACE = 32 * 1024 * 1024
_NAMES: dict[str, str] = {"fp32": "Float32", "uint8": "Byte", "int32": "Int32", "int64": "Int64"}


def setup_workspace_size(matrices: int) -> int:
    """Bytes that the addresses, sizes and factors of so many matrices take."""
    pointers = -(-matrices * 8 // 16) * 16
    if release().name == "2.14":
        return -(-(8 * pointers + 6 * 4 * matrices) // 256) * 256
    return 7 * pointers + 8 * matrices + 7 * 4 * matrices + 256


def one_factor_a_matrix() -> bool:
    """Whether every matrix has an alpha and a beta of its own: from Blackwell on."""
    return release().name == "2.14" or 100 <= sm_arch() <= 110


def check_counts(name: str, count: int, a: int, b: int, d: int) -> None:
    """That there are as many A, B and D. `name` is the function's: which of them it asks for first."""
    nvte_check(count > 0, GEMM, "Grouped GEMM requires non-empty inputs.")
    if name == "te_general_grouped_gemm_for_discrete_in":
        nvte_check(a == count, GEMM, "Grouped GEMM requires A_list to have num_tensors elements.")
    nvte_check(b == count, GEMM, "Grouped GEMM requires A and B to have the same num_tensors.")
    if name == "te_general_grouped_gemm_for_discrete_out":
        nvte_check(d == count, GEMM, "Grouped GEMM requires D_list to have num_tensors elements.")
    nvte_check(d == count, GEMM, "Grouped GEMM requires D to have the same num_tensors as inputs.")


def check_factors(alpha: Tensor, beta: Tensor, count: int) -> None:
    """The number of alphas and betas."""
    if release().name == "2.14":
        for name, factor in (("alpha", alpha), ("beta", beta)):
            nvte_check(
                factor.numel() == count, GEMM, f"Grouped GEMM expects {name} to have num_tensors elements."
            )
        return
    nvte_check(
        alpha.numel() in (count, 1),
        GEMM,
        f"Grouped GEMM expects alpha to have 1 or num_tensors ({count}) elements, got {alpha.numel()}",
    )
    nvte_check(
        beta.numel() == alpha.numel(),
        GEMM,
        f"Grouped GEMM expects beta to have the same number of elements as alpha ({alpha.numel()}), "
        f"got {beta.numel()}",
    )


def check_device(api: str, alpha: Tensor, beta: Tensor, count: int) -> None:
    """That the posing device has grouped GEMMs, and takes so many factors; its cuBLAS has."""
    arch = sm_arch()
    if release().name == "2.14":
        nvte_check(arch >= 100, CUBLAS, f"{api} requires Blackwell (SM100) or newer architecture.")
        return
    nvte_check(90 <= arch <= 110, CUBLAS, f"{api} requires Hopper (SM90) or Blackwell (SM10x and SM110).")
    wanted, described = (count, "num_tensors") if one_factor_a_matrix() else (1, "1")
    for name, factor in (("alpha", alpha), ("beta", beta)):
        nvte_check(
            factor.numel() == wanted,
            CUBLAS,
            f"Grouped GEMM: {name} must have {described} element(s), got {factor.numel()}",
        )


def check_operands(a: Matrices, b: Matrices) -> None:
    """Element types of A and B, and that they fit each other. Of a list TE's messages speak otherwise."""
    old = release().name == "2.14"
    known = ("e4m3", "e5m2", "bf16", "fp16") if old else ("e4m3", "e5m2", "e2m1", "bf16", "fp16")
    for side in (b,) if a.listed else (a, b):
        nvte_check(
            side.format in known or not (side.has_rows or side.has_columns),
            CUBLAS,
            f"Grouped GEMM inputs must be FP8, {'' if old else 'NVFP4, '}BF16, or FP16, "
            f"got {_NAMES.get(side.format, side.format)}.",
        )
    if a.listed:
        kinds = "FP8, BF16, or FP16" if old else "FP8, NVFP4, BF16, or FP16"
        nvte_check(a.format in known, CUBLAS, f"Grouped GEMM: A_list tensors must be {kinds}.")
        nvte_check(
            old or bool(a.kind) == bool(b.kind),
            CUBLAS,
            "Grouped GEMM: A and B must both be low-precision (FP8/NVFP4) or both not.",
        )
    nvte_check(
        (a.kind == "FP8") == (b.kind == "FP8"),
        CUBLAS,
        "Grouped GEMM: A and B must both be FP8 or both be non-FP8.",
    )
    nvte_check(
        (a.kind == "FP4") == (b.kind == "FP4"),
        CUBLAS,
        "Grouped GEMM: A and B must both be NVFP4 or both be non-NVFP4.",
    )
    if not a.listed or old:
        nvte_check(
            (a.scaling == "mxfp8") == (b.scaling == "mxfp8"),
            CUBLAS,
            "Grouped GEMM: A and B must both use MXFP8 scaling or both "
            f"{'use tensor scaling' if old else 'not'}.",
        )
        nvte_check(
            a.blockwise == b.blockwise,
            CUBLAS,
            "Grouped GEMM: A and B must both use FP8 block scaling or both not.",
        )
    for side in (a, b):
        nvte_check(
            side.scaling != NVFP4_SCALING or side.swizzled,
            CUBLAS,
            "Grouped GEMM: scales must be swizzled for GEMM (MXFP8/NVFP4).",
        )


def check_outputs(a: Matrices, b: Matrices, dtype: torch.dtype, name: str) -> None:
    """The element type of D. `name` is what TE calls it: "outputs", or "D" of a list."""
    nvte_check(
        dtype in (torch.bfloat16, torch.float16, torch.float32),
        CUBLAS,
        f"Grouped GEMM: {name} must be BF16, FP16, or FP32.",
    )
    nvte_check(
        dtype != torch.float16 or "FP4" not in (a.kind, b.kind),
        CUBLAS,
        "FP4 GEMM does not support FP16 output!",
    )


def check_scalings(api: str, a: Matrices, b: Matrices) -> None:
    """Which scalings the posing device multiplies with each other."""
    if release().name == "2.14":
        for side in (a, b):
            nvte_check(
                not side.blockwise,
                CUBLAS,
                "Grouped GEMM is only supported with bf16, fp8 tensor scaling and MXFP8",
            )
        return
    nvte_check(
        not (a.scaling == b.scaling == "block_2d"),
        CUBLAS,
        f"{api}: Only 1D by 1D, 1D by 2D, and 2D by 1D FP8 block scaling grouped GEMM is supported, "
        "but got 2D by 2D.",
    )
    nvte_check(
        a.mode == b.mode or (a.blockwise and b.blockwise),
        CUBLAS,
        f"{api}: incompatible A/B scaling modes.",
    )
    nvte_check(
        not a.blockwise or 90 <= sm_arch() < 100,
        CUBLAS,
        f"{api}: FP8 block scaling grouped GEMM is only supported on Hopper (SM90-SM99), not SM{sm_arch()}.",
    )
    if a.scaling != NVFP4_SCALING:
        return
    nvte_check(
        one_factor_a_matrix(),
        CUBLAS,
        "Grouped GEMM: NVFP4 requires per-group alpha/beta support because each group has its own "
        "amax-derived global scale.",
    )


def check_amax(side: Matrices, transposed: bool) -> None:
    """That NVFP4's global scale can be found."""
    direction = "columnwise" if transposed == (side.name == "B") else "rowwise"
    there = side.has_amax.get(direction, ()) if side.scaling == NVFP4_SCALING else ()
    if not all(there):
        which = f"{side.name}_list tensor {there.index(False)}" if side.listed else side.name
        nvte_error(CUBLAS, f"Assertion failed. Grouped GEMM: NVFP4 {which} is missing amax.")


def check_workspaces(setup: Tensor, cublas: Tensor, count: int) -> None:
    """Sizes of the workspaces, which are not used here."""
    for name, workspace, needed in (
        ("Grouped GEMM setup workspace", setup, setup_workspace_size(count)),
        ("Grouped GEMM cuBLAS workspace", cublas, _CUBLAS_WORKSPACE),
    ):
        nvte_check(
            workspace.numel() >= needed,
            CUBLAS,
            f"Grouped GEMM: Insufficient {name}. Required: {needed} bytes, "
            f"Available: {workspace.numel()} bytes.",
        )


def check_bias(outputs: Any, bias: Any, scale: Tensor | None) -> bool:
    """Whether there is anything to add a bias to.

    Raises:
        RuntimeError: bias or factors that do not fit the outputs, in TE's words.
    """
    rows, columns = (int(size) for size in outputs.logical_shape)
    what = "Grouped bias add" if scale is None else "Grouped scaled bias add"
    if scale is not None:
        nvte_check(scale.dtype == torch.float32, CUBLAS, f"{what}: scale must be float32")
        nvte_check(scale.dim() == 1, CUBLAS, f"{what}: scale must be 1D, got {scale.dim()}D")
        nvte_check(
            scale.numel() == rows,
            CUBLAS,
            f"{what}: scale size ({scale.numel()}) must equal total rows ({rows})",
        )
    nvte_check(
        outputs.num_tensors == bias.num_tensors,
        CUBLAS,
        f"{what}: output and bias must have the same number of tensors",
    )
    nvte_check(
        outputs.get_dtype() == bias.get_dtype(), CUBLAS, f"{what}: output and bias must have matching dtypes"
    )
    nvte_check(bias.first_dims is None, CUBLAS, f"{what}: bias must have uniform first dim (expected 1)")
    shapes: Sequence[tuple[int, int]] = group_members(bias).shapes
    nvte_check(shapes[0][0] == 1, CUBLAS, f"{what}: bias first dim must be 1")
    nvte_check(
        outputs.last_dims is None and bias.last_dims is None,
        CUBLAS,
        f"{what}: requires uniform last dim for output and bias",
    )
    nvte_check(shapes[0][1] == columns, CUBLAS, f"{what}: output and bias last dims must match")
    nvte_check(
        outputs.num_tensors <= MOST_MATRICES,
        CUBLAS,
        f"{what} supports at most {MOST_MATRICES} tensors, got {outputs.num_tensors}",
    )
    if rows == 0:
        return False
    nvte_check(outputs.rowwise_data is not None, CUBLAS, f"{what}: output is missing row-wise data")
    nvte_check(bias.rowwise_data is not None, CUBLAS, f"{what}: bias is missing row-wise data")
    vector = 8 if outputs.rowwise_data.element_size() <= 2 else 4
    nvte_check(columns % vector == 0, CUBLAS, f"{what}: requires last dim divisible by {vector}")
    return True
