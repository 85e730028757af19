"""Matrix multiplication of all experts at once, in grouped tensors.

Follows `te_general_grouped_gemm_for_*` in `pytorch/csrc/extensions/gemm.cpp` and `nvte_grouped_gemm*` in
`common/gemm/cublaslt_grouped_gemm.cu` of Transformer Engine. The product of each expert is that of
`generic_gemm`; it is multiplied with alpha, D times beta is added, and the sum is rounded once. A bias is
added to the rounded result, by a kernel of its own, and rounded again.
"""

# ruff: noqa: ARG001  # multiprocessor counts are pybind's arguments
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.binding.checks import nvte_check
from nemo_fp8_recipes.emulation.binding.dtypes import short_name, te_name
from nemo_fp8_recipes.emulation.binding.gemm import multiply, record
from nemo_fp8_recipes.emulation.binding.gemm_problem import Epilogue, Problem
from nemo_fp8_recipes.emulation.binding.grouped_gemm_checks import (
    GEMM,
    check_amax,
    check_bias,
    check_counts,
    check_device,
    check_factors,
    check_operands,
    check_outputs,
    check_scalings,
    check_workspaces,
    setup_workspace_size,
)
from nemo_fp8_recipes.emulation.binding.grouped_operands import (
    CUBLAS,
    MOST_MATRICES,
    Matrices,
    group_members,
    matrices_of_group,
    matrices_of_list,
)
from nemo_fp8_recipes.emulation.binding.releases import release
from nemo_fp8_recipes.emulation.trace import observers

__all__ = [
    "get_grouped_gemm_setup_workspace_size",
    "te_general_grouped_gemm_for_discrete_in",
    "te_general_grouped_gemm_for_discrete_out",
    "te_general_grouped_gemm_for_grouped_tensor",
]

_NO_EPILOGUE = Epilogue(bias=False, gelu=False, grad=False)


def get_grouped_gemm_setup_workspace_size(num_tensors: int) -> int:
    """Bytes of the setup workspace for so many matrices."""
    return setup_workspace_size(num_tensors)


def te_general_grouped_gemm_for_grouped_tensor(*args: Any) -> Any:
    """D = alpha * op(B) @ op(A) + beta * D, and the bias, for every expert; A, B and D are grouped tensors.

    Arguments: A, transa, B, transb, D, bias; since 2.17 bias_scale, fp32 [rows of all D], what the bias is
    multiplied with row by row; alpha, beta, fp32, one an expert (one in all on Hopper); workspace_setup,
    workspace_cublas, use_split_accumulator, math_sm_count.

    Returns:
        D.

    Raises:
        RuntimeError: operands, factors or a device that TE or cuBLAS refuses.
    """
    return _BY_RELEASE[release().name](_grouped, *args)


def te_general_grouped_gemm_for_discrete_in(*args: Any) -> Any:
    """The same where A is a list of tensors: weights that are parameters each."""
    return _BY_RELEASE[release().name](_discrete_in, *args)


def te_general_grouped_gemm_for_discrete_out(*args: Any) -> Any:
    """The same where D is a list of tensors: gradients of such weights. There is no bias."""
    return _BY_RELEASE[release().name](_discrete_out, *args)


def _as_2_14(
    multiply_all: Callable[..., Any],
    A: Any,
    transa: bool,
    B: Any,
    transb: bool,
    D: Any,
    bias: Any,
    *rest: Any,
) -> Any:
    return multiply_all(A, transa, B, transb, D, bias, None, *rest)


def _as_2_17(multiply_all: Callable[..., Any], *args: Any) -> Any:
    return multiply_all(*args)


_BY_RELEASE: dict[str, Callable[..., Any]] = {"2.14": _as_2_14, "2.17": _as_2_17, "2.20": _as_2_17}


def _grouped(
    A: Any,
    transa: bool,
    B: Any,
    transb: bool,
    D: Any,
    bias: Any,
    bias_scale: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    workspace_setup: Tensor,
    workspace_cublas: Tensor,
    use_split_accumulator: bool,
    math_sm_count: int,
) -> Any:
    name, api = "te_general_grouped_gemm_for_grouped_tensor", "nvte_grouped_gemm"
    check_counts(name, A.num_tensors, A.num_tensors, B.num_tensors, D.num_tensors)
    check_factors(alpha, beta, A.num_tensors)
    check_device(api, alpha, beta, A.num_tensors)
    a, b = matrices_of_group("A", A), matrices_of_group("B", B)
    check_operands(a, b)
    check_outputs(a, b, _dtype_of(D), "outputs")
    _check_reading(api, a, transa, b, transb)
    check_workspaces(workspace_setup, workspace_cublas, len(a))
    _multiply_all(a, transa, b, transb, _outputs_of(D), alpha, beta, use_split_accumulator)
    _add_bias(D, bias, bias_scale)
    return D


def _discrete_in(
    A: Sequence[Any],
    transa: bool,
    B: Any,
    transb: bool,
    D: Any,
    bias: Any,
    bias_scale: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    workspace_setup: Tensor,
    workspace_cublas: Tensor,
    use_split_accumulator: bool,
    math_sm_count: int,
) -> Any:
    name, api = "te_general_grouped_gemm_for_discrete_in", "nvte_grouped_gemm_with_discrete_inputA"
    check_counts(name, B.num_tensors, len(A), B.num_tensors, D.num_tensors)
    check_factors(alpha, beta, B.num_tensors)
    check_device(api, alpha, beta, B.num_tensors)
    a, b = matrices_of_list("A", A), matrices_of_group("B", B)
    check_operands(a, b)
    check_outputs(a, b, _dtype_of(D), "outputs")
    _check_reading(api, a, transa, b, transb)
    check_workspaces(workspace_setup, workspace_cublas, len(a))
    _multiply_all(a, transa, b, transb, _outputs_of(D), alpha, beta, use_split_accumulator)
    _add_bias(D, bias, bias_scale)
    return D


def _discrete_out(
    A: Any,
    transa: bool,
    B: Any,
    transb: bool,
    D: Sequence[Tensor],
    bias: Any,
    bias_scale: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    workspace_setup: Tensor,
    workspace_cublas: Tensor,
    use_split_accumulator: bool,
    math_sm_count: int,
) -> Any:
    name, api = "te_general_grouped_gemm_for_discrete_out", "nvte_grouped_gemm_with_discrete_out"
    nvte_check(bias is None, GEMM, "Bias is not supported for discrete output grouped GEMM.")
    check_counts(name, A.num_tensors, A.num_tensors, B.num_tensors, len(D))
    check_factors(alpha, beta, A.num_tensors)
    check_device(api, alpha, beta, A.num_tensors)
    a, b = matrices_of_group("A", A), matrices_of_group("B", B)
    check_operands(a, b)
    check_outputs(a, b, D[0].dtype, "D")
    _check_reading(api, a, transa, b, transb)
    check_workspaces(workspace_setup, workspace_cublas, len(a))
    nvte_check(
        len(D) <= MOST_MATRICES,
        CUBLAS,
        f"Grouped GEMM: D_list supports up to {MOST_MATRICES} tensors per kernel, got {len(D)}",
    )
    for number, output in enumerate(D):
        nvte_check(
            output.dtype == D[0].dtype,
            CUBLAS,
            f"Grouped GEMM: D_list tensor {number} dtype mismatch. Expected {te_name(D[0].dtype)} "
            f"got {te_name(output.dtype)}",
        )
        nvte_check(output.dim() == 2, CUBLAS, f"Grouped GEMM: D_list tensor {number} must be 2D.")
    _multiply_all(a, transa, b, transb, [output.detach() for output in D], alpha, beta, use_split_accumulator)
    return D


def _check_reading(api: str, a: Matrices, transa: bool, b: Matrices, transb: bool) -> None:
    a.require_storage(bool(transa))
    b.require_storage(bool(transb))
    check_scalings(api, a, b)
    check_amax(a, bool(transa))
    check_amax(b, bool(transb))


def _dtype_of(grouped: Any) -> torch.dtype:
    if grouped.quantizer is not None:
        return torch.uint8
    dtype: torch.dtype = grouped.get_dtype() if grouped.rowwise_data is None else grouped.rowwise_data.dtype
    return dtype


def _outputs_of(grouped: Any) -> list[Tensor]:
    """The matrices of D, views of its buffer."""
    group = group_members(grouped)
    flat = grouped.rowwise_data.detach().view(-1)
    return [
        flat[start : start + rows * columns].view(rows, columns)
        for start, (rows, columns) in zip(group.starts, group.shapes, strict=True)
    ]


def _multiply_all(
    a: Matrices,
    transa: bool,
    b: Matrices,
    transb: bool,
    outputs: Sequence[Tensor],
    alpha: Tensor,
    beta: Tensor,
    split_accumulator: bool,
) -> None:
    alphas, betas = (factor.detach().reshape(-1).expand(len(a)).tolist() for factor in (alpha, beta))
    for number, output in enumerate(outputs):
        if 0 in a.shapes[number] or 0 in b.shapes[number]:
            _scale(output, betas[number])  # of an expert without tokens only the sum's other term is left
            continue
        problem = Problem(
            a.read(number, bool(transa)), bool(transa), b.read(number, bool(transb)), bool(transb)
        )
        nvte_check(
            tuple(output.shape) == (problem.n, problem.m),
            CUBLAS,
            f"Output {number} of the grouped GEMM has shape {tuple(output.shape)}, "
            f"and the product ({problem.n}, {problem.m}).",
        )
        problem.require_supported(
            _NO_EPILOGUE, split_accumulator=bool(split_accumulator), out_dtype=output.dtype
        )
        result = multiply(problem, alphas[number], ranges=(448, 448))
        if betas[number]:
            if problem.hopper_blockwise:
                result = result.to(output.dtype).to(torch.float32)
            result.add_(output.to(torch.float32), alpha=betas[number])
        output.copy_(result)
        if observers():
            record(problem, split_accumulator, bool(betas[number]), short_name(output.dtype))


def _scale(output: Tensor, beta: float) -> None:
    if not beta:
        output.zero_()
    elif beta != 1.0:
        output.copy_(output.to(torch.float32).mul_(beta))


def _add_bias(outputs: Any, bias: Any, scale: Tensor | None) -> None:
    """Add to the rows of each expert its bias, times a factor of the row where there are factors."""
    if bias is None or not check_bias(outputs, bias, scale):
        return
    group = group_members(outputs)
    columns = group.logical[1]
    rows = outputs.rowwise_data.detach().view(-1, columns)
    biases = bias.rowwise_data.detach().view(-1, columns)
    first = 0
    for number, (count, _) in enumerate(group.shapes):
        part = rows[first : first + count]
        if scale is None:
            part.copy_(part.to(torch.float32).add_(biases[number].to(torch.float32)))
        else:
            # One multiply-add, rounded once: the product of two fp32 is exact in fp64.
            factors = scale.detach()[first : first + count, None].to(torch.float64)
            total = part.to(torch.float64).addcmul_(biases[number].to(torch.float64), factors)
            part.copy_(total.to(torch.float32))
        first += count
