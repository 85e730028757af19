"""The compiled kernels as functions of torch tensors.

Quantisers write into tensors that their caller allocated. Inputs are contiguous host tensors; the caller has
checked shapes. What a function computes is defined by the function of `numerics/` that its docstring names.
"""

from __future__ import annotations

import ctypes
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.kernels import build
from nemo_fp8_recipes.numerics.formats import E4M3, Fp8Format

__all__ = ["Library", "Quantized", "for_codes", "for_tensor", "library"]

_INPUTS: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SWITCH = "NEMO_FP8_KERNELS"
# What a core quantises in the time that it takes to get another one to work: a waiting thread of torch's, or
# a new one (some 20 us).
_ELEMENTS_A_TEAM_THREAD = 1 << 13
_ELEMENTS_A_NEW_THREAD = 1 << 16

_lock = threading.Lock()
_library: Library | None = None
_looked = False

_VOID = ctypes.c_void_p
_INT = ctypes.c_int32
_LONG = ctypes.c_int64
_FLOAT = ctypes.c_float


class Quantized(NamedTuple):
    """Where one direction's codes and scales go: contiguous tensors."""

    codes: Tensor | None
    scales: Tensor | None

    @property
    def stride(self) -> int:
        """Elements between two rows of scales."""
        return 0 if self.scales is None else self.scales.shape[1]


_NOTHING = Quantized(None, None)


def library() -> Library | None:
    """The compiled kernels, built on the first call; None without them, which one warning explains."""
    global _library, _looked
    if not _looked:
        with _lock:
            if not _looked:
                _library = _find()
                _looked = True
    return _library


def for_tensor(x: Tensor) -> Library | None:
    """The kernels, where they can read `x`: a plain fp32, bf16 or fp16 host tensor."""
    return library() if x.device.type == "cpu" and x.dtype in _INPUTS else None


def for_codes(codes: Tensor) -> Library | None:
    """The kernels, where they can read these codes: contiguous on the host."""
    return library() if codes.device.type == "cpu" and codes.is_contiguous() else None


def _find() -> Library | None:
    choice = os.environ.get(_SWITCH, "")
    if choice == "eager":
        return None
    try:
        return Library(build.load(), _torch_team())
    except build.CannotBuildError as error:
        warnings.warn(
            "The emulated device runs without its compiled kernels: the results are the same, the steps are "
            f"slower. Reason: {error}.",
            build.SlowKernelsWarning,
            stacklevel=2,
        )
        return None


def _torch_team() -> int | None:
    """Address of `GOMP_parallel` in the OpenMP runtime that torch is linked with, None where it has none.

    Threads of two runtimes, or of a runtime and our own, would take the cores from each other.
    """
    if not torch.backends.openmp.is_available():
        return None
    for name in ("libtorch_cpu.so", "libtorch.so"):
        try:
            # Loaded already: this finds it, and looks the name up in what it depends on.
            function = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))["GOMP_parallel"]
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value
    return None


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _format(fmt: Fp8Format) -> int:
    return 0 if fmt is E4M3 else 1


class Library:
    """The functions of a loaded library.

    Args:
        loaded: what `build.load` returns.
        team: address of the `GOMP_parallel` whose threads they run on, None for threads of their own. They
            use as many as torch does. In a forked child they go on with threads of their own.
    """

    def __init__(self, loaded: ctypes.CDLL, team: int | None = None) -> None:
        def bind(name: str, result: object, *arguments: object) -> Callable[..., Any]:
            function = loaded[f"nemo_fp8_{name}"]
            function.restype = result  # type: ignore[assignment]  # a ctypes type or None
            function.argtypes = arguments  # type: ignore[assignment]  # ctypes types
            return function

        bind("use_team", None, _VOID)(team)
        self._has_team = bind("has_team", _INT)
        matrix = (_VOID, _INT, _LONG, _LONG)
        self._amax = bind("amax", _FLOAT, _VOID, _INT, _LONG, _INT)
        self._cast = bind("cast", _FLOAT, *matrix, _INT, _FLOAT, _VOID, _VOID, _INT, _INT)
        scales = (_VOID, _VOID, _LONG)
        self._mxfp8 = bind("mxfp8", None, *matrix, _INT, _FLOAT, _INT, _INT, *scales, *scales, _LONG, _INT)
        self._blockwise = bind("blockwise", None, *matrix, _INT, _FLOAT, _INT, _INT, *scales, *scales, _INT)
        self._nvfp4 = bind("nvfp4", None, *matrix, _VOID, _INT, _INT, _INT, _VOID, _VOID, _VOID, _LONG, _INT)
        self._transpose = bind("transpose", None, _VOID, _LONG, _LONG, _INT, _VOID, _INT)
        self._hadamard = bind("hadamard_columns", _FLOAT, _VOID, _LONG, _LONG, _INT, _VOID, _INT)
        self._decode = bind("decode", None, _VOID, _LONG, _INT, _VOID, _INT)
        codes = (_VOID, _LONG, _LONG, _INT, _INT)
        self._decode_mxfp8 = bind("decode_mxfp8", None, *codes, _INT, _VOID, _LONG, _LONG, _VOID, _INT)
        self._decode_blockwise = bind("decode_blockwise", None, *codes, _VOID, _LONG, _VOID, _INT)
        self._decode_nvfp4 = bind("decode_nvfp4", None, _VOID, _LONG, _LONG, _INT, _VOID, _LONG, _VOID, _INT)

    def _threads(self, elements: int) -> int:
        available = torch.get_num_threads()
        if available == 1:
            return 1
        share = _ELEMENTS_A_TEAM_THREAD if self._has_team() else _ELEMENTS_A_NEW_THREAD
        return max(1, min(available, elements // share))

    def amax(self, x: Tensor) -> float:
        """Largest magnitude, NaN ignored, 0 for an empty tensor: `numerics.amax`."""
        count = x.numel()
        largest: float = self._amax(x.data_ptr(), _INPUTS[x.dtype], count, self._threads(count))
        return largest

    def cast(
        self,
        x: Tensor,
        fmt: Fp8Format,
        scale: float,
        codes: Tensor,
        transposed: Tensor | None = None,
        *,
        observe: bool = False,
    ) -> float:
        """Per-tensor codes: `numerics.tensorwise.quantize`.

        Args:
            x: [M, K].
            fmt: element format.
            scale: what x is multiplied with.
            codes: uint8 of M * K elements.
            transposed: uint8 of M * K elements for the codes of x transposed, or None.
            observe: find x's amax too.

        Returns:
            amax of x, NaN ignored, where `observe` is set; else 0.
        """
        m, k = x.shape
        largest: float = self._cast(
            x.data_ptr(),
            _INPUTS[x.dtype],
            m,
            k,
            _format(fmt),
            scale,
            codes.data_ptr(),
            _at(transposed),
            observe,
            self._threads(m * k),
        )
        return largest

    def mxfp8(
        self,
        x: Tensor,
        fmt: Fp8Format,
        rowwise: Quantized | None,
        columnwise: Quantized | None,
        *,
        square: bool,
        swizzled: bool,
    ) -> None:
        """MXFP8: `numerics.mxfp8.quantize_rowwise`, `quantize_columnwise` and `quantize_2d`.

        Args:
            x: [M, K], multiples of 32.
            fmt: element format.
            rowwise: where codes [M, K] and scales, uint8 [>= M, >= K / 32], go.
            columnwise: where codes [M, K] and scales, uint8 [>= M / 32, >= K], go.
            square: blocks of 32x32, their scale repeated.
            swizzled: write the scales (padded to 128 x 4) in the GEMM's order.
        """
        m, k = x.shape
        rows, columns = rowwise or _NOTHING, columnwise or _NOTHING
        self._mxfp8(
            x.data_ptr(),
            _INPUTS[x.dtype],
            m,
            k,
            _format(fmt),
            fmt.max_reciprocal,
            square,
            swizzled,
            _at(rows.codes),
            _at(rows.scales),
            rows.stride,
            _at(columns.codes),
            _at(columns.scales),
            0 if columns.scales is None else columns.scales.shape[0],
            columns.stride,
            self._threads(m * k),
        )

    def blockwise(
        self,
        x: Tensor,
        fmt: Fp8Format,
        rowwise: Quantized | None,
        columnwise: Quantized | None,
        *,
        square: bool,
        epsilon: float,
        power_of_two: bool,
    ) -> None:
        """FP8 block scaling: `numerics.blockwise.quantize_1d`, `quantize_1d_columnwise` and `quantize_2d`.

        Args:
            x: [M, K].
            fmt: element format.
            rowwise: where codes [M, K] and scales, fp32 [ceil(K / 128), >= M] (square: [ceil(M / 128),
                >= ceil(K / 128)]), go.
            columnwise: where the same of the transposed matrix goes: codes [K, M].
            square: blocks of 128x128.
            epsilon, power_of_two: as in `numerics`.
        """
        m, k = x.shape
        rows, columns = rowwise or _NOTHING, columnwise or _NOTHING
        self._blockwise(
            x.data_ptr(),
            _INPUTS[x.dtype],
            m,
            k,
            _format(fmt),
            epsilon,
            power_of_two,
            square,
            _at(rows.codes),
            _at(rows.scales),
            rows.stride,
            _at(columns.codes),
            _at(columns.scales),
            columns.stride,
            self._threads(m * k),
        )

    def nvfp4(
        self,
        x: Tensor,
        amax: Tensor,
        out: Quantized,
        *,
        square: bool,
        swizzled: bool = False,
        random: Tensor | None = None,
    ) -> None:
        """NVFP4: `numerics.nvfp4.quantize_1d` and `quantize_2d`.

        Args:
            x: [M, K], K a multiple of 16.
            amax: fp32, one element or M.
            out: where codes, uint8 [M, K / 2], and scales, uint8 [>= M, >= K / 16], go.
            square: blocks of 16x16, their scale repeated for each row.
            swizzled: write the scales (padded to 128 x 4) in the GEMM's order.
            random: uint8 [M, K] for stochastic rounding.
        """
        m, k = x.shape
        self._nvfp4(
            x.data_ptr(),
            _INPUTS[x.dtype],
            m,
            k,
            amax.data_ptr(),
            amax.numel() > 1,
            square,
            swizzled,
            _at(random),
            _at(out.codes),
            _at(out.scales),
            out.stride,
            self._threads(m * k),
        )

    def transpose(self, x: Tensor) -> Tensor:
        """The transposed matrix [K, M] of x [M, K], contiguous."""
        m, k = x.shape
        out = torch.empty(k, m, dtype=x.dtype)
        self._transpose(x.data_ptr(), m, k, x.itemsize, out.data_ptr(), self._threads(m * k))
        return out

    def hadamard_columns(self, x: Tensor, sign_mask: int) -> tuple[Tensor, float]:
        """`numerics.hadamard.random_hadamard_transform` of x transposed, and the amax of that, NaN ignored.

        Args:
            x: bf16 [M, K], M a multiple of 16.
            sign_mask: as in `numerics`.

        Returns:
            bf16 [K, M] and the amax.
        """
        m, k = x.shape
        out = torch.empty(k, m, dtype=x.dtype)
        largest: float = self._hadamard(x.data_ptr(), m, k, sign_mask, out.data_ptr(), self._threads(m * k))
        return out, largest

    def decode(self, codes: Tensor, fmt: Fp8Format) -> Tensor:
        """fp32 values of contiguous codes: `numerics.decode`."""
        values = torch.empty(codes.shape, dtype=torch.float32)
        count = codes.numel()
        self._decode(codes.data_ptr(), count, _format(fmt), values.data_ptr(), self._threads(count))
        return values

    def decode_mxfp8(
        self, codes: Tensor, scales: Tensor, fmt: Fp8Format, *, columnwise: bool, swizzled: bool
    ) -> Tensor:
        """fp32 values [M, K]: `numerics.mxfp8.dequantize_rowwise` and `dequantize_columnwise`.

        Args:
            codes: uint8 [M, K].
            scales: uint8, padded as in `mxfp8`.
            fmt: element format.
            columnwise: the blocks run along columns.
            swizzled: the scales are in the GEMM's order.
        """
        m, k = codes.shape
        values = torch.empty(m, k, dtype=torch.float32)
        rows, stride = scales.shape
        self._decode_mxfp8(
            codes.data_ptr(),
            m,
            k,
            _format(fmt),
            columnwise,
            swizzled,
            scales.data_ptr(),
            rows,
            stride,
            values.data_ptr(),
            self._threads(m * k),
        )
        return values

    def decode_blockwise(self, codes: Tensor, scales: Tensor, fmt: Fp8Format, *, square: bool) -> Tensor:
        """fp32 values [M, K]: `numerics.blockwise.dequantize_1d` and `dequantize_2d`, of the scales as
        `blockwise` writes the rowwise ones.
        """
        m, k = codes.shape
        values = torch.empty(m, k, dtype=torch.float32)
        self._decode_blockwise(
            codes.data_ptr(),
            m,
            k,
            _format(fmt),
            square,
            scales.data_ptr(),
            scales.shape[1],
            values.data_ptr(),
            self._threads(m * k),
        )
        return values

    def decode_nvfp4(self, packed: Tensor, scales: Tensor, *, swizzled: bool = False) -> Tensor:
        """code * block scale, fp32 [M, K]: `numerics.nvfp4.block_values` of scales for blocks of 1x16.

        Args:
            packed: uint8 [M, K / 2].
            scales: uint8 [>= M, >= K / 16].
            swizzled: the scales (padded to 128 x 4) are in the GEMM's order.
        """
        m, half = packed.shape
        values = torch.empty(m, 2 * half, dtype=torch.float32)
        self._decode_nvfp4(
            packed.data_ptr(),
            m,
            2 * half,
            swizzled,
            scales.data_ptr(),
            scales.stride(0),
            values.data_ptr(),
            self._threads(2 * m * half),
        )
        return values
