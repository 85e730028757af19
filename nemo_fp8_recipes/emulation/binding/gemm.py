"""Matrix multiplication.

Follows `gemm` and `te_general_grouped_gemm` in `pytorch/csrc/extensions/gemm.cpp` and `cublas_gemm` in
`common/gemm/cublaslt_gemm.cu` of Transformer Engine. In row-major terms D[n, m] = op(B)[n, k] @ op(A)[k, m].

Operands are decoded to fp32 and multiplied in fp32; bias, GELU and accumulation are added to the fp32 result,
which is rounded once to the output dtype. What is not followed: the order of summation, the reduced-precision
accumulators that `use_split_accumulator=False` allows on Hopper, and TF32, which cuBLAS uses where every
operand is fp32.
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
from nemo_fp8_recipes.emulation.binding.device import non_tn_fp8_gemm_supported, sm_arch
from nemo_fp8_recipes.emulation.binding.dtypes import fp8_format, short_name, torch_dtype
from nemo_fp8_recipes.emulation.binding.operands import PER_TENSOR, Operand, operand
from nemo_fp8_recipes.emulation.binding.quantize import is_delayed, quantize_as
from nemo_fp8_recipes.emulation.binding.storage import flat_2d
from nemo_fp8_recipes.emulation.binding.te_classes import te_classes
from nemo_fp8_recipes.emulation.trace import GemmRecord, OperandRecord, observers

__all__ = ["generic_gemm", "te_general_grouped_gemm"]

SOURCE = "pytorch/csrc/extensions/gemm.cpp"
CUBLAS = "common/gemm/cublaslt_gemm.cu"


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
        use_split_accumulator: recorded; sums are fp32 in either case.
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
    a = operand("A", A, columnwise=not transA)
    b = operand("B", B, columnwise=transB)
    shape = _output_shape(a.shape, transA, b.shape, transB)
    dtype = _output_dtype(output_dtype, a)
    low_precision = a.quantized or b.quantized

    output = D
    if isinstance(D, Tensor) and not isinstance(D, te_classes().quantized_storage):
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
    if math.prod(a.shape) == 0 or math.prod(b.shape) == 0:
        result = torch.zeros(shape, dtype=torch.float32)
        if accumulate and D is not None:
            result = D.to(torch.float32)
        if bias is not None and grad:
            bias_grad = torch.zeros(b.shape[-1], dtype=dtype)
        if gelu and not grad:
            pre_gelu = torch.zeros(shape, dtype=pre_gelu_dtype)
    else:
        _check_cublas(a, transA, b, transB, epilogue=(bias is not None, gelu, grad))
        result = _multiply(a, transA, b, transB, alpha).view(shape)
        if accumulate:
            result.add_(D.detach().to(torch.float32), alpha=1.0 if beta is None else beta)
        if bias is not None and not grad:
            result.add_(bias.detach().to(torch.float32))
        if gelu and not grad:
            pre_gelu = result.to(pre_gelu_dtype)
            result = gelu_forward(result)
        elif gelu:
            assert gelu_in is not None
            result.mul_(gelu_backward(gelu_in.detach().to(torch.float32).view(shape)))
        if bias is not None and grad:
            bias_grad = _bias_grad(b).to(dtype)
        if observers():
            _record(a, transA, b, transB, use_split_accumulator, accumulate, quantizer, dtype)

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
) -> Sequence[Tensor] | None:
    """One GEMM after the other; bias gradients are written into `bias`, GELU inputs into `pre_gelu_out`."""
    nvte_check(
        not single_output or D is not None,
        SOURCE,
        "not implemented, D should be allocated for single output case.",
    )
    outputs: list[Tensor] = []
    offset = 0
    flat = D[0].detach().view(-1) if single_output and D is not None else None
    for number, (a, b) in enumerate(zip(A, B, strict=True)):
        target = D[number] if D is not None and not single_output else None
        if flat is not None:
            a_shape = operand("A", a, columnwise=not transa).shape
            b_shape = operand("B", b, columnwise=transb).shape
            shape = _output_shape(a_shape, transa, b_shape, transb)
            target = flat[offset : offset + math.prod(shape)].view(shape)
            offset += math.prod(shape)
        has_bias = bool(bias) and bias[number].numel() > 0
        saved = pre_gelu_out[number] if pre_gelu_out and pre_gelu_out[number].numel() > 0 else None
        output, bias_grad, pre_gelu, _ = generic_gemm(
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
        outputs.append(output)
        if bias_grad is not None:
            bias[number].copy_(bias_grad)
        if pre_gelu is not None and saved is not None:
            saved.copy_(pre_gelu)
    return outputs if D is None else bias


def _output_shape(
    a_shape: Sequence[int], trans_a: bool, b_shape: Sequence[int], trans_b: bool
) -> tuple[int, ...]:
    """Shape of D: B's outer dimensions (flattened where B is transposed), then m. `getGemmOutputShape`."""
    nvte_check(len(a_shape) >= 1, SOURCE, "Tensor A needs to have at least 1 dimension")
    nvte_check(len(b_shape) >= 1, SOURCE, "Tensor B needs to have at least 1 dimension")
    a0, a1 = flat_2d(a_shape)
    b0, b1 = flat_2d(b_shape)
    nvte_check(
        (a1 if trans_a else a0) == (b0 if trans_b else b1),
        SOURCE,
        f"Invalid matrix dimensions for GEMM (A=({a0},{a1}), transa={int(trans_a)}, "
        f"B=({b0},{b1}), transb={int(trans_b)})",
    )
    outer = (b1,) if trans_b else tuple(b_shape[:-1])
    return (*outer, a0 if trans_a else a1)


def _output_dtype(tag: Any, a: Operand) -> torch.dtype:
    if tag is not None:
        return torch_dtype(tag)
    nvte_check(not a.quantized, SOURCE, "The output of an FP8 GEMM needs an element type.")
    dtype: torch.dtype = a.tensor.dtype
    return dtype


def _check_cublas(
    a: Operand, trans_a: bool, b: Operand, trans_b: bool, *, epilogue: tuple[bool, bool, bool]
) -> None:
    """What `cublas_gemm` and cuBLAS refuse, in the order in which they do."""
    _check_formats(a, b)
    if not a.quantized:
        return
    a0, a1 = flat_2d(a.shape)
    b0, b1 = flat_2d(b.shape)
    m = a0 if trans_a else a1
    n = b1 if trans_b else b0
    k = a1 if trans_a else a0
    if a.scaling == PER_TENSOR:
        _check_per_tensor(a, b, trans_a, trans_b, m, n, k)
    elif a.scaling != "mxfp8":
        _check_blockwise(a, b, m, n, k, epilogue)


def _check_formats(a: Operand, b: Operand) -> None:
    modes = {a.scaling, b.scaling}
    # In TE's C++, per-tensor FP8 and unquantised tensors share one scaling mode.
    compatible = a.scaling == b.scaling or modes in ({"block_1d", "block_2d"}, {"none", PER_TENSOR})
    nvte_check(
        compatible,
        CUBLAS,
        "Inputs A and B to GEMM need to have compatible scaling modes, but got "
        f"A.scaling_mode = {a.scaling}, B.scaling_mode = {b.scaling}",
    )
    unsupported = a.quantized != b.quantized or (a.format == "e5m2" and b.format == "e5m2")
    if not a.quantized and a.format != b.format:
        unsupported = True
    if unsupported:
        nvte_error(
            CUBLAS, f"Unable to find suitable cuBLAS GEMM algorithm (A is {a.format}, B is {b.format})"
        )


def _check_per_tensor(a: Operand, b: Operand, trans_a: bool, trans_b: bool, m: int, n: int, k: int) -> None:
    any_layout = non_tn_fp8_gemm_supported()
    lda = k if trans_a or not any_layout else m
    ldb = n if trans_b and any_layout else k
    if any_layout and a.tensor._data is None:
        lda = m if trans_a else k
    if any_layout and b.tensor._data is None:
        ldb = k if trans_b else n
    nvte_check(lda % 16 == 0, CUBLAS, "Leading dimension requirement on A for FP8 GEMM. Caller must pad.")
    nvte_check(ldb % 16 == 0, CUBLAS, "Leading dimension requirement on B for FP8 GEMM. Caller must pad.")


def _check_blockwise(
    a: Operand, b: Operand, m: int, n: int, k: int, epilogue: tuple[bool, bool, bool]
) -> None:
    if sm_arch() >= 100:
        return  # runs as MXFP8, which asks for none of this
    nvte_check(
        k % 16 == 0, CUBLAS, "Leading dimension requirement on NVTE_BLOCK_SCALING GEMM. Caller must pad."
    )
    nvte_check(
        m % 8 == 0,
        CUBLAS,
        "Outer dimension requirement on A for NVTE_BLOCK_SCALING GEMM. Caller must pad.",
    )
    if b.scaling == "block_1d":
        nvte_check(
            n % 8 == 0,
            CUBLAS,
            "Outer dimension requirement on B for NVTE_BLOCK_SCALING GEMM. Caller must pad.",
        )
    nvte_check(
        not (a.scaling == "block_2d" and b.scaling == "block_2d"),
        CUBLAS,
        "Only 1D by 1D, 1D by 2D, and 2D by 1D block scaling GEMM is supported, but got 2D by 2D",
    )
    bias, gelu, grad = epilogue
    nvte_check(
        not (bias or gelu) or (bias and not gelu and not grad) or (gelu and grad and not bias),
        CUBLAS,
        "Epilogue requested outside of the available and tested cuBLAS functionality for "
        "float8 block scaled GEMM",
    )


def _multiply(a: Operand, trans_a: bool, b: Operand, trans_b: bool, alpha: float) -> Tensor:
    """fp32 product [n, m]."""
    a_matrix, a_factor = a.matrix()
    b_matrix, b_factor = b.matrix()
    product = torch.mm(
        b_matrix.t() if trans_b else b_matrix,
        a_matrix.t() if trans_a else a_matrix,
    )
    if a_factor is not None and b_factor is not None:
        product.mul_(a_factor * b_factor)
    return product.mul_(alpha) if alpha != 1.0 else product


def _bias_grad(b: Operand) -> Tensor:
    """Sum of B over its rows, fp32 [columns]. In every GEMM with a bias gradient B is the output gradient."""
    matrix, factor = b.matrix()
    total = matrix.sum(dim=0)
    return total if factor is None else total.mul_(factor)


def _record(
    a: Operand,
    trans_a: bool,
    b: Operand,
    trans_b: bool,
    split_accumulator: bool,
    accumulate: bool,
    quantizer: Any,
    dtype: torch.dtype,
) -> None:
    a0, a1 = flat_2d(a.shape)
    b0, b1 = flat_2d(b.shape)
    record = GemmRecord(
        layout=("T" if trans_a else "N") + ("T" if trans_b else "N"),
        a=OperandRecord(a.format, a.scaling, a.usage, type(a.tensor).__name__),
        b=OperandRecord(b.format, b.scaling, b.usage, type(b.tensor).__name__),
        m=a0 if trans_a else a1,
        n=b1 if trans_b else b0,
        k=a1 if trans_a else a0,
        split_accumulator=bool(split_accumulator),
        accumulate=accumulate,
        out_dtype=short_name(dtype) if quantizer is None else fp8_format(quantizer.dtype).name,
    )
    for observer in observers():
        observer.gemms.append(record)
