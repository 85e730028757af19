"""All kernels on one matrix, for tests of what runs beside them."""

from __future__ import annotations

import numpy as np
import torch

from nemo_fp8_recipes.emulation.kernels import Library, Nvfp4Direction, Quantized
from nemo_fp8_recipes.numerics import E4M3
from nemo_fp8_recipes.telemetry.coded import Coded

__all__ = ["everything"]


def everything(kernels: Library, x: torch.Tensor) -> list[bytes]:
    """What every kernel makes of x, fp32 [M, K], multiples of 32, and of the codes that come out of it.

    Memory comes from NumPy: torch would clear it on several threads, which hangs in a forked process.
    """
    m, k = x.shape

    def out(*shape: int) -> torch.Tensor:
        return torch.from_numpy(np.zeros(shape, np.uint8))

    def fp32(*shape: int) -> torch.Tensor:
        return torch.from_numpy(np.zeros(shape, np.float32))

    codes, transposed, alone = out(m, k), out(k, m), out(m, k)
    per_tensor = torch.from_numpy(np.full((1, 1), 1 / 3, np.float32))
    found = [torch.tensor(kernels.cast(x, E4M3, 3.0, codes, transposed, observe=True)), codes, transposed]
    kernels.cast(x, E4M3, 3.0, alone)
    found += [torch.tensor(kernels.amax(x)), alone, kernels.decode(codes, E4M3)]
    found.append(kernels.measure(x, Coded(codes, per_tensor, "e4m3", (m, k))))
    for square in (False, True):
        rows, columns = Quantized(out(m, k), out(m, k // 32)), Quantized(out(m, k), out(m // 32, k))
        kernels.mxfp8(x, E4M3, rows, columns, square=square, swizzled=False)
        found += [*rows, *columns]
        for columnwise, of in ((False, rows), (True, columns)):
            found.append(kernels.decode_mxfp8(*of, E4M3, columnwise=columnwise, swizzled=False))
        down, across = -(-m // 128), -(-k // 128)
        rows = Quantized(out(m, k), fp32(down, across) if square else fp32(across, m))
        columns = Quantized(out(k, m), fp32(across, down) if square else fp32(down, k))
        kernels.blockwise(x, E4M3, rows, columns, square=square, epsilon=0.0, power_of_two=True)
        found += [*rows, *columns, kernels.decode_blockwise(*rows, E4M3, square=square)]
        amax = torch.from_numpy(np.full(1, 2, np.float32))
        packed = Quantized(out(m, k // 2), out(m, k // 16))
        lying = Quantized(out(k, m // 2), out(k, m // 16))
        directions = Nvfp4Direction(*packed, amax, 2**63), Nvfp4Direction(*lying, amax, 1)
        kernels.nvfp4(x, *directions, square=square, stochastic=not square)
        found += [*packed, *lying, kernels.decode_nvfp4(*packed)]
        found.append(kernels.measure(x, Coded(*packed, "e2m1", (1, 16), amax=amax)))
    rows = Quantized(out(m, k), out(m, k // 32))
    kernels.mxfp8(x, E4M3, rows, None, square=False, swizzled=False)
    half = torch.from_numpy(np.ascontiguousarray(x.view(torch.int32).numpy() >> 16).astype(np.int16))
    found += kernels.amax_with_hadamard(half.view(torch.bfloat16), 0b1010)
    return [tensor.numpy().tobytes() for tensor in (*found, *rows)]
