"""Quantising a matrix on a CPU core: the emulated device's kernels beside torch, torch.compile and torchao.

    python benchmarks/quantize.py [--size 2048] [--dtype float32] [--threads 1] [--spread 0] [--rounds 9]
        [--only "per tensor"]

Same tensor, same thread count, in turn; with one thread CPU time is measured, which other programs disturb
less. The ratios of a table are to our kernel: 5 means five times slower. The last table counts bytes read and
written against `copy_` into an allocated tensor, which is the limit. Needs the test dependencies (torchao)
and a C++ compiler, which torch.compile needs too. What a table finds depends on those before it: once the
process has freed large blocks, its temporaries are memory that it has already.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from side_by_side import in_turn, ratio_table
from torchao.float8.config import ScalingGranularity
from torchao.float8.float8_utils import tensor_to_scale, to_fp8_saturated
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

from nemo_fp8_recipes.emulation.kernels import Library, Nvfp4Direction, Quantized, library
from nemo_fp8_recipes.numerics import E4M3, amax, blockwise, fp4, hadamard, mxfp8, nvfp4, tensorwise

OURS = "ours"
MOVED = {
    "MXFP8, rowwise": (1, 1.03),
    "MXFP8, rowwise and columnwise": (1, 2.06),
    "per tensor, current scaling": (2, 1.0),
    "blockwise 1x128, rowwise": (1, 1.03),
    "NVFP4, rowwise": (2, 0.56),
    "NVFP4 of a bf16 gradient": (2, 1.13),
}
"""How often a kernel reads the tensor, and bytes it writes an element."""


def mxfp8_contenders(x: torch.Tensor, kernels: Library) -> dict[str, Callable[[], object]]:
    """Rowwise MXFP8, rounding the scales up."""
    m, k = x.shape
    codes, scales = (torch.empty(m, columns, dtype=torch.uint8) for columns in (k, k // 32))

    def torchao() -> object:
        return to_mx(x, torch.float8_e4m3fn, 32, ScaleCalculationMode.RCEIL)

    def ours() -> None:
        kernels.mxfp8(x, E4M3, Quantized(codes, scales), None, square=False, swizzled=False)

    compiled = torch.compile(mxfp8.quantize_rowwise)
    torchao_compiled = torch.compile(to_mx)
    return {
        OURS: ours,
        "numerics (eager torch)": lambda: mxfp8.quantize_rowwise(x, E4M3),
        "numerics, torch.compile": lambda: compiled(x, E4M3),
        "torchao to_mx": torchao,
        "torchao to_mx, torch.compile": lambda: torchao_compiled(
            x, torch.float8_e4m3fn, 32, ScaleCalculationMode.RCEIL
        ),
    }


def both_directions_contenders(x: torch.Tensor, kernels: Library) -> dict[str, Callable[[], object]]:
    m, k = x.shape
    rows = Quantized(torch.empty(m, k, dtype=torch.uint8), torch.empty(m, k // 32, dtype=torch.uint8))
    columns = Quantized(torch.empty(m, k, dtype=torch.uint8), torch.empty(m // 32, k, dtype=torch.uint8))

    def eager() -> object:
        return mxfp8.quantize_rowwise(x, E4M3), mxfp8.quantize_columnwise(x, E4M3)

    def torchao() -> object:
        mode = ScaleCalculationMode.RCEIL
        transposed = x.t().contiguous()
        return [to_mx(matrix, torch.float8_e4m3fn, 32, mode) for matrix in (x, transposed)]

    return {
        OURS: lambda: kernels.mxfp8(x, E4M3, rows, columns, square=False, swizzled=False),
        "numerics (eager torch)": eager,
        "torchao to_mx of x and its transpose": torchao,
    }


def per_tensor_contenders(x: torch.Tensor, kernels: Library) -> dict[str, Callable[[], object]]:
    codes = torch.empty(x.shape, dtype=torch.uint8)

    def ours() -> None:
        kernels.cast(x, E4M3, E4M3.max / kernels.amax(x), codes)

    def torchao() -> object:
        scale = tensor_to_scale(x, torch.float8_e4m3fn, scaling_granularity=ScalingGranularity.TENSORWISE)
        return to_fp8_saturated(x * scale, torch.float8_e4m3fn)

    return {
        OURS: ours,
        "numerics (eager torch)": lambda: tensorwise.quantize_current(x, E4M3),
        "torchao tensor_to_scale + to_fp8_saturated": torchao,
    }


def blockwise_contenders(x: torch.Tensor, kernels: Library) -> dict[str, Callable[[], object]]:
    m, k = x.shape
    out = Quantized(torch.empty(m, k, dtype=torch.uint8), torch.empty(-(-k // 128), m))
    options = {"epsilon": 0.0, "power_of_two": True}
    return {
        OURS: lambda: kernels.blockwise(x, E4M3, out, None, square=False, **options),
        "numerics (eager torch)": lambda: blockwise.quantize_1d(x, E4M3, **options),
    }


def nvfp4_contenders(x: torch.Tensor, kernels: Library) -> dict[str, Callable[[], object]]:
    """Rowwise NVFP4 under the tensor's own amax, to nearest."""
    m, k = x.shape
    codes, scales = (torch.empty(m, columns, dtype=torch.uint8) for columns in (k // 2, k // 16))

    def ours() -> None:
        largest = torch.tensor([kernels.amax(x)])
        kernels.nvfp4(x, Nvfp4Direction(codes, scales, largest), None, square=False)

    def torchao() -> object:
        return nvfp4_quantize(x, 16, per_tensor_amax_to_scale(x.abs().max()))

    return {
        OURS: ours,
        "numerics (eager torch)": lambda: nvfp4.quantize_1d(x, amax(x).view(1)),
        "torchao nvfp4_quantize": torchao,
    }


def nvfp4_gradient_contenders(x: torch.Tensor, kernels: Library) -> dict[str, Callable[[], object]]:
    """What a gradient is made into: both directions, columns transformed, rounded stochastically."""
    x = x.bfloat16()
    m, k = x.shape
    outs = [
        (
            torch.empty(rows, columns // 2, dtype=torch.uint8),
            torch.empty(rows, columns // 16, dtype=torch.uint8),
        )
        for rows, columns in ((m, k), (k, m))
    ]

    def ours() -> None:
        amaxes = kernels.amax_with_hadamard(x, hadamard.SIGN_MASK)
        rows, columns = (
            Nvfp4Direction(*out, largest, int(fp4.random_key(x.device)))
            for out, largest in zip(outs, amaxes, strict=True)
        )
        kernels.nvfp4(x, rows, columns, square=False, stochastic=True, sign_mask=hadamard.SIGN_MASK)

    def eager() -> object:
        columns = hadamard.random_hadamard_transform(x.t().contiguous())
        return [nvfp4.quantize_1d(each, amax(each).view(1), stochastic=True) for each in (x, columns)]

    return {OURS: ours, "numerics (eager torch)": eager}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=int, default=2048, help="rows and columns of the matrix")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of its elements")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--spread", type=float, default=0.0, help="standard deviation of ln |factor| on normal values"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="the tables that have this in their title")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kernels = library()
    if kernels is None:
        raise SystemExit("There are no compiled kernels to measure here.")
    size = options.size
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, size, generator=generator)
    x *= torch.exp(options.spread * torch.randn(size, size, generator=generator))
    x = x.to(getattr(torch, options.dtype))
    target = torch.empty_like(x)
    print(f"{size} x {size} {options.dtype}, {options.threads} thread(s), spread {options.spread}, ", end="")
    print(f"torch {torch.__version__}\n")
    best: dict[str, list[float]] = {}
    for title, contenders in (
        ("MXFP8, rowwise", mxfp8_contenders(x, kernels)),
        ("MXFP8, rowwise and columnwise", both_directions_contenders(x, kernels)),
        ("per tensor, current scaling", per_tensor_contenders(x, kernels)),
        ("blockwise 1x128, rowwise", blockwise_contenders(x, kernels)),
        ("NVFP4, rowwise", nvfp4_contenders(x, kernels)),
        ("NVFP4 of a bf16 gradient", nvfp4_gradient_contenders(x, kernels)),
    ):
        if options.only not in title:
            continue
        contenders["copy_"] = lambda: target.copy_(x)
        times = in_turn(contenders, rounds=options.rounds, repeats=5)
        best[title] = [own / copy for own, copy in zip(times[OURS], times["copy_"], strict=True)]
        print(ratio_table(title, times, against=OURS, unit="ms", scale=1e3), end="\n\n")
    print(
        "share of copy_'s bandwidth that our kernels reach (bytes read and written, what is read for an amax"
    )
    print("and again for the codes counted twice; min, median, max)")
    for title, ratios in best.items():
        reads, written = MOVED[title]
        element = 2 if "bf16" in title else x.element_size()
        shares = sorted((reads * element + written) / (2 * x.element_size()) / ratio for ratio in ratios)
        print(f"  {title:32} {shares[0]:5.0%} {statistics.median(shares):5.0%} {shares[-1]:5.0%}")


if __name__ == "__main__":
    main()
