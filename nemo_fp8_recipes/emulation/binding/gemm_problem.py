"""One matrix multiplication: its operands and dimensions, and what TE and cuBLAS refuse of it.

Follows `getGemmOutputShape` in `pytorch/csrc/extensions/gemm.cpp`, and `CanonicalizeGemmInput` and
`cublas_gemm` in `common/gemm/cublaslt_gemm.cu` of Transformer Engine.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nemo_fp8_recipes.emulation.binding.checks import nvte_check, nvte_error
from nemo_fp8_recipes.emulation.binding.device import non_tn_fp8_gemm_supported, sm_arch
from nemo_fp8_recipes.emulation.binding.operands import NVFP4_SCALING, PER_TENSOR, Operand
from nemo_fp8_recipes.emulation.binding.storage import flat_2d

__all__ = ["Epilogue", "Problem"]

SOURCE = "pytorch/csrc/extensions/gemm.cpp"
CUBLAS = "common/gemm/cublaslt_gemm.cu"


@dataclass(frozen=True)
class Epilogue:
    """What is done to the product before it is written: bias (its gradient, with `grad`) and GELU."""

    bias: bool
    gelu: bool
    grad: bool


@dataclass(frozen=True)
class Problem:
    """D[n, m] = op(B)[n, k] @ op(A)[k, m], in row-major terms.

    Raises:
        RuntimeError: shapes that do not fit each other.
    """

    a: Operand
    trans_a: bool
    b: Operand
    trans_b: bool

    def __post_init__(self) -> None:
        nvte_check(len(self.a.shape) >= 1, SOURCE, "Tensor A needs to have at least 1 dimension")
        nvte_check(len(self.b.shape) >= 1, SOURCE, "Tensor B needs to have at least 1 dimension")
        a0, a1 = flat_2d(self.a.shape)
        b0, b1 = flat_2d(self.b.shape)
        nvte_check(
            (a1 if self.trans_a else a0) == (b0 if self.trans_b else b1),
            SOURCE,
            f"Invalid matrix dimensions for GEMM (A=({a0},{a1}), transa={int(self.trans_a)}, "
            f"B=({b0},{b1}), transb={int(self.trans_b)})",
        )

    @property
    def m(self) -> int:
        return flat_2d(self.a.shape)[0 if self.trans_a else 1]

    @property
    def n(self) -> int:
        return flat_2d(self.b.shape)[1 if self.trans_b else 0]

    @property
    def k(self) -> int:
        return flat_2d(self.a.shape)[1 if self.trans_a else 0]

    @property
    def layout(self) -> str:
        """Transpose flags: "TN", "NN" or "NT"."""
        return ("T" if self.trans_a else "N") + ("T" if self.trans_b else "N")

    @property
    def empty(self) -> bool:
        """Whether an operand has no elements, so that no GEMM is run."""
        return 0 in self.a.shape or 0 in self.b.shape

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of D: B's outer dimensions (flattened where B is transposed), then m."""
        return ((self.n,) if self.trans_b else self.b.shape[:-1]) + (self.m,)

    @property
    def hopper_blockwise(self) -> bool:
        """Whether this is block scaling on the tensor cores that know it."""
        return self.a.scaling in ("block_1d", "block_2d") and sm_arch() < 100

    def require_supported(
        self, epilogue: Epilogue, *, split_accumulator: bool, out_dtype: torch.dtype
    ) -> None:
        """What the GEMM on the posing device takes.

        Raises:
            RuntimeError: formats, layouts, dimensions or epilogues that it refuses, in TE's words.
        """
        self._require_formats()
        if self.a.scaling == PER_TENSOR:
            self._require_per_tensor()
        elif self.a.scaling == NVFP4_SCALING:
            # cuBLAS asks for rows of whole 16 bytes: 32 elements of A and B, 8 of a 16-bit D.
            _require_algorithm(self.k % 32 == 0 and self.m % 8 == 0, f"m={self.m}, n={self.n}, k={self.k}")
        elif self.hopper_blockwise:
            self._require_blockwise(epilogue, split_accumulator, out_dtype)
        elif self.a.scaling in ("block_1d", "block_2d"):
            # From Blackwell on these run as MXFP8: TE checks nothing, cuBLAS asks for rows of whole 16 bytes.
            _require_algorithm(self.k % 16 == 0 and self.m % 8 == 0, f"m={self.m}, n={self.n}, k={self.k}")

    def _require_formats(self) -> None:
        a, b = self.a, self.b
        # In TE's C++, per-tensor FP8 and unquantised tensors share one scaling mode.
        alike = ({"block_1d", "block_2d"}, {"none", PER_TENSOR})
        nvte_check(
            a.scaling == b.scaling or {a.scaling, b.scaling} in alike,
            CUBLAS,
            "Inputs A and B to GEMM need to have compatible scaling modes, but got "
            f"A.scaling_mode = {a.scaling}, B.scaling_mode = {b.scaling}",
        )
        both_fp8 = a.quantized and b.quantized and not (a.format == b.format == "e5m2")
        same_high_precision = not a.quantized and a.format == b.format
        _require_algorithm(both_fp8 or same_high_precision, f"A is {a.format}, B is {b.format}")

    def _require_per_tensor(self) -> None:
        a_reads_rows, b_reads_rows = self.trans_a, not self.trans_b
        if not non_tn_fp8_gemm_supported():
            lda = ldb = self.k  # both are read with k innermost, from transposed data where need be
        else:
            # Without rowwise data the transposed data is read, with the mirrored flag.
            a_reads_rows ^= self.a.tensor._data is None
            b_reads_rows ^= self.b.tensor._data is None
            lda = self.k if a_reads_rows else self.m
            ldb = self.k if b_reads_rows else self.n
        for name, leading in (("A", lda), ("B", ldb)):
            nvte_check(
                leading % 16 == 0,
                CUBLAS,
                f"Leading dimension requirement on {name} for FP8 GEMM. Caller must pad.",
            )

    def _require_blockwise(self, epilogue: Epilogue, split_accumulator: bool, out_dtype: torch.dtype) -> None:
        where = "for NVTE_BLOCK_SCALING GEMM. Caller must pad."
        nvte_check(
            self.k % 16 == 0,
            CUBLAS,
            "Leading dimension requirement on NVTE_BLOCK_SCALING GEMM. Caller must pad.",
        )
        nvte_check(self.m % 8 == 0, CUBLAS, f"Outer dimension requirement on A {where}")
        if self.b.scaling == "block_1d":
            nvte_check(self.n % 8 == 0, CUBLAS, f"Outer dimension requirement on B {where}")
        nvte_check(
            not (self.a.scaling == self.b.scaling == "block_2d"),
            CUBLAS,
            "Only 1D by 1D, 1D by 2D, and 2D by 1D block scaling GEMM is supported, but got 2D by 2D",
        )
        available = (
            Epilogue(bias=False, gelu=False, grad=epilogue.grad),
            Epilogue(bias=True, gelu=False, grad=False),
            Epilogue(bias=False, gelu=True, grad=True),
        )
        nvte_check(
            epilogue in available,
            CUBLAS,
            "Epilogue requested outside of the available and tested cuBLAS functionality for "
            "float8 block scaled GEMM",
        )
        nvte_check(
            not epilogue.gelu or out_dtype == torch.bfloat16,
            CUBLAS,
            "cuBLAS Error: an unsupported value or parameter was passed to the function",
        )
        # cuBLAS has block-scaled kernels with the split accumulator only.
        _require_algorithm(split_accumulator, "block scaling with use_split_accumulator=False")


def _require_algorithm(condition: bool, problem: str) -> None:
    """What cuBLAS has no kernel for: TE's check of the heuristic's answer."""
    if not condition:
        nvte_error(
            CUBLAS,
            "Assertion failed: status != CUBLAS_STATUS_NOT_SUPPORTED. "
            f"Unable to find suitable cuBLAS GEMM algorithm ({problem})",
        )
