"""Matrix multiplication.

Follows `gemm` and `te_general_grouped_gemm` in `pytorch/csrc/extensions/gemm.cpp` and `cublas_gemm` in
`common/gemm/cublaslt_gemm.cu` of Transformer Engine. In row-major terms D[n, m] = op(B)[n, k] @ op(A)[k, m].

Operands are decoded to fp32 and multiplied in fp32; bias, GELU and accumulation are added to the fp32 result,
which is rounded once to the output dtype. Hopper's block-scaled GEMM rounds twice when it accumulates: the
product (and bias) to the output dtype, then the sum (`references/blockwise_fp8_gemm_reference.py` of TE's
tests).
What is not followed: the order of summation, the reduced-precision accumulators that
`use_split_accumulator=False` allows on Hopper, and TF32, which cuBLAS uses where every operand is fp32.
"""

# ruff: noqa: ARG001  # workspaces and multiprocessor counts are pybind's arguments
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.binding.activation import gelu_backward, gelu_forward
from nemo_fp8_recipes.emulation.binding.checks import not_emulated, nvte_check, nvte_error
from nemo_fp8_recipes.emulation.binding.dtypes import element_format, short_name, torch_dtype
from nemo_fp8_recipes.emulation.binding.gemm_problem import Epilogue, Problem
from nemo_fp8_recipes.emulation.binding.operands import NVFP4_SCALING, PER_TENSOR, Operand, operand
from nemo_fp8_recipes.emulation.binding.quantize import is_delayed, quantize_as
from nemo_fp8_recipes.emulation.binding.releases import release
from nemo_fp8_recipes.emulation.trace import GemmRecord, OperandRecord, observers
from nemo_fp8_recipes.numerics.nvfp4 import gemm_scale

__all__ = ["generic_gemm", "multiply", "record", "te_general_grouped_gemm"]

SOURCE = "pytorch/csrc/extensions/gemm.cpp"


def generic_gemm(
    A: Any,
    transA: bool,
    B: Any,
    transB: bool,
    D: Any,
    quantizer: Any,
    output_dtype: Any,
    bias: Tensor | None,
    bias_type: Any,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Tensor | None = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> list[Any]:
    """D = alpha * op(B) @ op(A) + beta * D, with bias and GELU.

    Args:
        A, transA, B, transB: operands, plain or quantised, and whether they are read transposed.
        D: output to write into, or None.
        quantizer: quantise the output with it.
        output_dtype: element type of the output; A's where None.
        bias: forward: added to every row. With `grad`: only asks for the bias gradient.
        bias_type: element type of the bias; with FP8 operands that of `gelu_in` too.
        gelu: apply GELU (forward), or multiply with its derivative at `gelu_in` (`grad`).
        gelu_in: input of GELU, saved by the forward pass.
        grad: a GEMM of the backward pass.
        accumulate: add to D.
        use_split_accumulator: recorded; sums are fp32 in either case. Hopper's block scaling demands it.
        alpha, beta: factors of product and D; beta is 1 when accumulating.

    Returns:
        [D, bias gradient or None, input of GELU (forward only) or None, extra output or None].

    Raises:
        RuntimeError: shapes, usages or formats that the GEMM on the posing device refuses, in TE's words.
        NotImplementedError: overlap with communication.
    """
    if comm_overlap is not None or bulk_overlap or extra_output is not None:
        not_emulated("generic_gemm with communication overlap", "Switch tp_comm_overlap off.")
    nvte_check(A is not None, SOURCE, "Tensor A has not been provided")
    nvte_check(B is not None, SOURCE, "Tensor B has not been provided")
    nvte_check(
        accumulate or not beta,
        SOURCE,
        "Trying to use non-zero beta while not accumulating into D tensor. "
        "Beta has nothing to be applied to.",
    )
    if accumulate and quantizer is not None:
        not_emulated("generic_gemm that accumulates into a quantised output")
    a = operand("A", A, columnwise=not transA)
    b = operand("B", B, columnwise=transB)
    problem = Problem(a, bool(transA), b, bool(transB))
    shape = problem.output_shape
    dtype = _output_dtype(output_dtype, a)
    low_precision = a.quantized or b.quantized

    output = D
    if D is not None and quantizer is None:
        nvte_check(
            tuple(D.shape) == shape,
            SOURCE,
            f"GEMM output has invalid dims (expected {shape}, got {tuple(D.shape)})",
        )
        nvte_check(
            output_dtype is None or D.dtype == dtype,
            SOURCE,
            f"GEMM output has invalid dtype (expected {dtype}, found {D.dtype})",
        )
        dtype = D.dtype

    pre_gelu_dtype = torch_dtype(bias_type) if low_precision else dtype
    bias_grad = pre_gelu = None
    if problem.empty:
        # No GEMM runs and neither bias nor GELU is applied; what is not accumulated into is zeroed.
        result = D.detach().to(torch.float32) if accumulate else torch.zeros(shape, dtype=torch.float32)
        if bias is not None and grad:
            bias_grad = torch.zeros(b.shape[-1], dtype=dtype)
        if gelu and not grad:
            pre_gelu = torch.zeros(shape, dtype=pre_gelu_dtype)
    else:
        problem.require_supported(
            Epilogue(bias=bias is not None, gelu=gelu, grad=grad),
            split_accumulator=bool(use_split_accumulator),
            out_dtype=dtype,
        )
        if bias is not None and gelu and grad:
            not_emulated("generic_gemm with the gradients of bias and GELU in one")
        result = multiply(problem, alpha).view(shape)
        if bias is not None and not grad:
            result.add_(bias.detach().to(torch.float32))
        if accumulate:
            if problem.hopper_blockwise:
                result = result.to(dtype).to(torch.float32)
            result.add_(D.detach().to(torch.float32), alpha=1.0 if beta is None else beta)
        if gelu and not grad:
            pre_gelu = result.to(pre_gelu_dtype)
            result = gelu_forward(result)
        elif gelu:
            if gelu_in is None:
                nvte_error(SOURCE, "The gradient of GELU needs gelu_in.")
            result.mul_(gelu_backward(gelu_in.detach().to(torch.float32).view(shape)))
        if bias is not None and grad:
            bias_grad = _bias_grad(b).to(dtype)
        if observers():
            written = short_name(dtype) if quantizer is None else element_format(quantizer.dtype)
            record(problem, use_split_accumulator, accumulate, written)

    if quantizer is not None:
        # Only the per-tensor kernels write FP8 themselves, and only under a scale that is known beforehand.
        fused = is_delayed(quantizer) and PER_TENSOR in (a.scaling, b.scaling)
        source = result if fused else result.to(dtype)
        output = quantize_as(source, quantizer, dtype, caller="generic_gemm", output=D)
    elif D is None:
        output = result.to(dtype)
    else:
        D.detach().copy_(result)
    return [output, bias_grad, pre_gelu, None]


def te_general_grouped_gemm(
    A: Sequence[Any],
    transa: bool,
    B: Sequence[Any],
    transb: bool,
    D: Sequence[Tensor] | None,
    D_type: Any,
    m_splits: Sequence[int],
    bias: Sequence[Tensor],
    bias_type: Any,
    single_output: bool,
    pre_gelu_out: Sequence[Tensor],
    grad: bool,
    workspace: Sequence[Tensor],
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    math_sm_count: int,
) -> Sequence[Tensor]:
    """One GEMM after the other, into `D`; bias gradients go into `bias`, inputs of GELU into
    `pre_gelu_out`.
    """
    nvte_check(
        not single_output or D is not None,
        SOURCE,
        "not implemented, D should be allocated for single output case.",
    )
    offset = 0
    flat = D[0].detach().view(-1) if single_output and D is not None else None
    for number, (a, b) in enumerate(zip(A, B, strict=True)):
        target = D[number] if D is not None and not single_output else None
        if flat is not None:
            a_operand = operand("A", a, columnwise=not transa)
            b_operand = operand("B", b, columnwise=transb)
            shape = Problem(a_operand, transa, b_operand, transb).output_shape
            target = flat[offset : offset + math.prod(shape)].view(shape)
            offset += math.prod(shape)
        has_bias = bool(bias) and bias[number].numel() > 0
        saved = pre_gelu_out[number] if pre_gelu_out and pre_gelu_out[number].numel() > 0 else None
        _, bias_grad, pre_gelu, _ = generic_gemm(
            a,
            transa,
            b,
            transb,
            target,
            None,
            D_type,
            bias[number] if has_bias else None,
            bias_type,
            saved is not None,
            saved,
            grad,
            workspace[0],
            workspace_size,
            accumulate,
            use_split_accumulator,
        )
        if bias_grad is not None:
            bias[number].copy_(bias_grad)
        if pre_gelu is not None and saved is not None:
            saved.copy_(pre_gelu)
    return bias


def _output_dtype(tag: Any, a: Operand) -> torch.dtype:
    if tag is not None:
        return torch_dtype(tag)
    nvte_check(not a.quantized, SOURCE, "The output of an FP8 GEMM needs an element type.")
    dtype: torch.dtype = a.tensor.dtype
    return dtype


def multiply(problem: Problem, alpha: float, ranges: tuple[int, int] | None = None) -> Tensor:
    """alpha * op(B) @ op(A), fp32 [n, m].

    Args:
        problem: the operands.
        alpha: the caller's factor.
        ranges: of NVFP4, what the global scales of A and B were made with; the tensors' own where None.
    """
    a, a_factor = problem.a.matrix()
    b, b_factor = problem.b.matrix()
    product = torch.mm(b.t() if problem.trans_b else b, a.t() if problem.trans_a else a)
    if a_factor is not None and b_factor is not None and problem.a.scaling == NVFP4_SCALING:
        own = (release().field(each.tensor, "nvfp4_e4m3_max") for each in (problem.a, problem.b))
        return product.mul_(gemm_scale(a_factor, b_factor, alpha, *(ranges or own)))
    if a_factor is not None and b_factor is not None:
        product.mul_(a_factor * b_factor)
    return product.mul_(alpha) if alpha != 1.0 else product


def _bias_grad(b: Operand) -> Tensor:
    """Sum of B over its rows, fp32 [columns]. In every GEMM with a bias gradient B is the output gradient."""
    if b.scaling == NVFP4_SCALING:
        not_emulated("generic_gemm with a bias gradient of an NVFP4 tensor")
    matrix, factor = b.matrix()
    total = matrix.sum(dim=0)
    return total if factor is None else total.mul_(factor)


def record(problem: Problem, split_accumulator: bool, accumulate: bool, out_dtype: str) -> None:
    """Tell the open traces of a GEMM."""
    a, b = problem.a, problem.b
    made = GemmRecord(
        layout=problem.layout,
        a=OperandRecord(a.format, a.scaling, a.usage, type(a.tensor).__name__),
        b=OperandRecord(b.format, b.scaling, b.usage, type(b.tensor).__name__),
        m=problem.m,
        n=problem.n,
        k=problem.k,
        split_accumulator=bool(split_accumulator),
        accumulate=bool(accumulate),
        out_dtype=out_dtype,
    )
    for observer in observers():
        observer.gemms.append(made)
