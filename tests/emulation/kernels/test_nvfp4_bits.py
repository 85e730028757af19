"""NVFP4's kernels give the bits of `numerics`, for every bit pattern of an input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_fp8_recipes import numerics
from nemo_fp8_recipes.emulation.kernels import Library, Nvfp4Direction, Quantized
from nemo_fp8_recipes.numerics import fp4, hadamard, nvfp4
from nemo_fp8_recipes.numerics.philox import random_bytes
from tests.emulation.kernels.test_bits import FEW, codes_of, matrices, same
from tests.numerics.inputs import mixed

KEYS = {"row": -(2**63) + 5, "column": 2**62 + 7}


def expected(
    source: torch.Tensor, amax: torch.Tensor, *, square: bool, key: int | None, divided: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `numerics` makes of one direction, its scales repeated for every row."""
    quantize = nvfp4.quantize_2d if square else nvfp4.quantize_1d
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp4, "random_key", lambda device, generator=None: torch.tensor([key]))
        packed, scales = quantize(source, amax, stochastic=key is not None, divided=divided)
    return packed, scales.repeat_interleave(16, dim=0) if square else scales


@FEW
@given(
    x=matrices(multiple_of=16),
    square=st.booleans(),
    stochastic=st.booleans(),
    divided=st.booleans(),
    directions=st.sampled_from(["row", "column", "both"]),
    largest=st.sampled_from(["own", "each", "unlike", 0.0, 1.0, 1e-38, 3e38, float("inf"), float("nan")]),
    sign_mask=st.none() | st.integers(0, 2**16 - 1),
)
def test_nvfp4(
    kernels: Library,
    x: torch.Tensor,
    square: bool,
    stochastic: bool,
    divided: bool,
    directions: str,
    largest: str | float,
    sign_mask: int | None,
) -> None:
    square = square and sign_mask is None
    if sign_mask is not None:
        x = x.bfloat16()
    sources = {"row": x, "column": x.t().contiguous()}
    if sign_mask is not None:
        sources["column"] = hadamard.random_hadamard_transform(sources["column"], sign_mask)
    outs: dict[str, Nvfp4Direction] = {}
    for name, source in sources.items():
        if directions not in (name, "both"):
            continue
        m, k = source.shape
        if largest == "each" and not square:
            amax = numerics.amax(source, dim=1)
        else:
            amax = torch.tensor([largest]) if isinstance(largest, float) else numerics.amax(x).reshape(1)
        if largest == "unlike" and name == "column":
            amax = amax * 3.0
        outs[name] = Nvfp4Direction(codes_of(m, k // 2), codes_of(m + 2, k // 16 + 1), amax, KEYS[name])
    kernels.nvfp4(
        x,
        outs.get("row"),
        outs.get("column"),
        square=square,
        stochastic=stochastic,
        sign_mask=sign_mask,
        divided=divided,
    )
    for name, out in outs.items():
        m, k = sources[name].shape
        key = KEYS[name] if stochastic else None
        packed, scales = expected(sources[name], out.amax, square=square, key=key, divided=divided)
        assert same(out.codes, packed)
        kept = out.scales[:m, : k // 16]
        assert same(kept, scales)
        assert same(kernels.decode_nvfp4(out.codes, kept), nvfp4.block_values(packed, scales))


@FEW
@given(x=matrices(multiple_of=16).filter(lambda x: x.shape[0] > 16))
def test_rows_alone_may_be_of_any_number(kernels: Library, x: torch.Tensor) -> None:
    x = x[:-5]
    m, k = x.shape
    out = Nvfp4Direction(codes_of(m, k // 2), codes_of(m, k // 16), torch.tensor([1.0]))
    kernels.nvfp4(x, out, None, square=False)
    packed, scales = expected(x, out.amax, square=False, key=None)
    assert same(out.codes, packed)
    assert same(out.scales, scales)


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize(("m", "k"), [(16, 16), (128, 64), (144, 208)])
def test_scales_in_the_gemms_order(kernels: Library, m: int, k: int, square: bool) -> None:
    from nemo_fp8_recipes.emulation.binding.mxfp8 import swizzle
    from nemo_fp8_recipes.emulation.binding.nvfp4 import scale_shape

    x, amax = mixed((m, k), torch.bfloat16), torch.tensor([3.0])
    shapes = ((m, k), (k, m))
    natural, swizzled = (
        [Quantized(codes_of(r, c // 2), torch.zeros(scale_shape(r, c), dtype=torch.uint8)) for r, c in shapes]
        for _ in range(2)
    )
    for outs, order in ((natural, False), (swizzled, True)):
        rows, columns = (Nvfp4Direction(*out, amax) for out in outs)
        kernels.nvfp4(x, rows, columns, square=square, swizzled=order)
    for plain, gemm in zip(natural, swizzled, strict=True):
        assert same(gemm.codes, plain.codes)
        assert same(gemm.scales, swizzle(plain.scales, columnwise=False))
        assert same(kernels.decode_nvfp4(*gemm, swizzled=True), kernels.decode_nvfp4(*plain))


@FEW
@given(x=matrices(multiple_of=16), sign_mask=st.integers(0, 2**16 - 1))
def test_amax_with_the_hadamard_transform(kernels: Library, x: torch.Tensor, sign_mask: int) -> None:
    x = x.bfloat16()
    plain, transformed = kernels.amax_with_hadamard(x, sign_mask)
    columns = hadamard.random_hadamard_transform(x.t().contiguous(), sign_mask)
    assert same(plain, numerics.amax(x).view(1))
    assert same(transformed, numerics.amax(columns).view(1))


def test_every_value_under_every_random_byte(kernels: Library) -> None:
    """Stochastic rounding between all neighbours of E2M1, at the ends of its regions and beyond them."""
    values = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0, 1.75, 1.999, 2.0, 2.5, 3.5, 3.99, 4.0, 5.0, 5.99, 6.0])
    nan, infinite = torch.tensor([float("nan")]), torch.tensor([float("inf"), -float("inf")] * 8)
    row = torch.cat([values, nan, -values, nan, infinite])
    x = row.repeat(4096, 1)
    # The multiplier of blocks with an amax of 6 is 1 under this one of the tensor.
    amax = torch.tensor([448.0 * 6.0])
    m, k = x.shape
    rows = Nvfp4Direction(codes_of(m, k // 2), codes_of(m, k // 16), amax, KEYS["row"])
    columns = Nvfp4Direction(codes_of(m, k // 2), codes_of(m, k // 16), amax, KEYS["column"])
    kernels.nvfp4(x, rows, None, square=False, stochastic=True)
    kernels.nvfp4(x.t().contiguous(), None, columns, square=False, stochastic=True)
    for out in (rows, columns):
        bytes_drawn = random_bytes(torch.tensor([out.key]), x.numel()).view(m, k)
        assert all(len(column.unique()) == 256 for column in bytes_drawn.t())
        packed, scales = expected(x, amax, square=False, key=out.key)
        assert same(out.codes, packed)
        assert same(out.scales, scales)
