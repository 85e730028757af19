"""What the emulated device computed: one record for every GEMM and every quantisation.

    with trace() as observed:
        model(x).sum().backward()
    assert all(gemm.quantized for gemm in observed.gemms)

The records come from the bottom of the stack, from the operands that reached the GEMM, so they prove what a
recipe object, a config or a loss cannot: that the arithmetic was done in the formats asked for. Nothing is
recorded, and nothing is computed for records, unless a trace is open.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

__all__ = ["GemmRecord", "OperandRecord", "QuantizeRecord", "Trace", "observers", "trace"]


@dataclass(frozen=True)
class OperandRecord:
    """One input of a GEMM as it was multiplied.

    Attributes:
        format: "e4m3", "e5m2", or the dtype of an unquantised operand: "bf16", "fp16", "fp32".
        scaling: "tensorwise-or-delayed", "mxfp8", "block_1d", "block_2d", or "none" when not quantised.
        usage: "rowwise" or "columnwise": along which direction the scales that were used run.
        storage: class name of the tensor.
    """

    format: str
    scaling: str
    usage: str
    storage: str

    @property
    def quantized(self) -> bool:
        return self.scaling != "none"


@dataclass(frozen=True)
class GemmRecord:
    """One matrix multiplication, D[n, m] = op(B)[n, k] @ op(A)[k, m] in row-major terms.

    Attributes:
        layout: transpose flags of A and B as TE passes them: "TN" (forward), "NN" (dgrad), "NT" (wgrad).
        a: operand A (the weight in forward and dgrad, the input in wgrad).
        b: operand B (the input in forward, the output gradient in dgrad and wgrad).
        m, n, k: dimensions.
        split_accumulator: FP8 partial sums are promoted (`use_split_accumulator`).
        accumulate: the result was added to the output.
        out_dtype: "bf16", "fp16", "fp32"; "e4m3" or "e5m2" where the output was quantised.
    """

    layout: str
    a: OperandRecord
    b: OperandRecord
    m: int
    n: int
    k: int
    split_accumulator: bool
    accumulate: bool
    out_dtype: str

    @property
    def quantized(self) -> bool:
        """Whether both operands were FP8."""
        return self.a.quantized and self.b.quantized


@dataclass(frozen=True)
class QuantizeRecord:
    """One tensor quantised.

    Attributes:
        quantizer: class name of TE's quantizer.
        format: "e4m3", "e5m2" or "e2m1".
        shape: shape of the tensor.
        rowwise, columnwise: directions that were asked for.
        source: the binding function that quantised ("quantize", "layernorm_fwd", "bgrad_quantize", …).
        force_pow_2_scales: power-of-two scales; None where the quantizer has no such option.
        amax_epsilon: lower bound on the amax; None where the quantizer has no such option.
        block_scaling_dim: 1 or 2 for block scaling, else None.
        with_2d_quantization: MXFP8's 32x32 or NVFP4's 16x16 blocks; None where the quantizer has no such
            option.
        with_rht, stochastic_rounding: NVFP4's Hadamard transform and rounding; None elsewhere.
        with_amax_reduction: the amax was reduced over a process group.
    """

    quantizer: str
    format: str
    shape: tuple[int, ...]
    rowwise: bool
    columnwise: bool
    source: str
    force_pow_2_scales: bool | None = None
    amax_epsilon: float | None = None
    block_scaling_dim: int | None = None
    with_2d_quantization: bool | None = None
    with_rht: bool | None = None
    stochastic_rounding: bool | None = None
    with_amax_reduction: bool = False


@dataclass(eq=False)
class Trace:
    """What was recorded, in order of execution."""

    gemms: list[GemmRecord] = field(default_factory=list)
    quantizations: list[QuantizeRecord] = field(default_factory=list)

    def clear(self) -> None:
        """Forget what was recorded so far."""
        self.gemms.clear()
        self.quantizations.clear()


_open: list[Trace] = []


def observers() -> list[Trace]:
    """The traces that are open now; records go to all of them."""
    return _open


@contextmanager
def trace() -> Iterator[Trace]:
    """Record what the emulated device computes until the block ends. May be nested."""
    opened = Trace()
    _open.append(opened)
    try:
        yield opened
    finally:
        _open.remove(opened)
