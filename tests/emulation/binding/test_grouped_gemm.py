"""GEMMs over grouped tensors: every expert's product is that of a GEMM of its own."""

from __future__ import annotations

import pytest
import torch

from nemo_fp8_recipes import emulation
from nemo_fp8_recipes.emulation.binding import operands
from tests.emulation.binding.test_grouped import nvfp4
from tests.emulation.binding.test_quantize import blockwise, mxfp8, tensorwise
from tests.support.te_release import RELEASE, since

pytestmark = since("2.14")

TOKENS = [128, 0, 256, 128]
INPUTS, OUTPUTS = 128, 256
EXPERTS = len(TOKENS)
LAYOUTS = ["TN", "NN", "NT"]
CASES = ["grouped", "discrete in", "discrete out"]


def square_blocks(te):
    return blockwise(te, dim=2)


def plain(te):
    return None


FORMATS = [
    pytest.param("blackwell", plain, plain, id="bf16"),
    pytest.param("blackwell", mxfp8, mxfp8, id="mxfp8"),
    pytest.param("blackwell", nvfp4, nvfp4, id="nvfp4", marks=since("2.17")),
    pytest.param("blackwell", tensorwise, tensorwise, id="tensorwise", marks=since("2.20")),
    pytest.param("hopper", plain, plain, id="bf16-hopper", marks=since("2.17")),
    pytest.param("hopper", tensorwise, tensorwise, id="tensorwise-hopper", marks=since("2.20")),
    pytest.param("hopper", blockwise, blockwise, id="blockwise-hopper", marks=since("2.20")),
    pytest.param("hopper", blockwise, square_blocks, id="square-weights-hopper", marks=since("2.20")),
]


def storage():
    from transformer_engine.pytorch.tensor.storage import grouped_tensor_storage

    return grouped_tensor_storage.GroupedTensorStorage


def wrap(data, rows=None):
    """A group of plain matrices: of so many rows each, or all alike."""
    experts = EXPERTS if rows is None else len(rows)
    first = None if rows is None else torch.tensor(rows)
    offsets = None if rows is None else torch.cat((first.new_zeros(1), first.cumsum(0))) * data.shape[1]
    return storage()(
        tuple(data.shape),
        data.dtype,
        num_tensors=experts,
        data=data.reshape(-1),
        first_dims=first,
        tensor_offsets=offsets,
    )


def shapes(layout, tokens=TOKENS):
    """Shapes of A, B and D of every expert."""
    if layout == "TN":
        return [((OUTPUTS, INPUTS), (rows, INPUTS), (rows, OUTPUTS)) for rows in tokens]
    if layout == "NN":
        return [((OUTPUTS, INPUTS), (rows, OUTPUTS), (rows, INPUTS)) for rows in tokens]
    return [((rows, INPUTS), (rows, OUTPUTS), (OUTPUTS, INPUTS)) for rows in tokens]


def grouped_operand(tex, parts, quantizer, alike):
    rows = None if alike else [len(part) for part in parts]
    if quantizer is None:
        return wrap(torch.cat(parts), rows)
    quantizer.optimize_for_gemm = not alike or hasattr(quantizer, "with_rht")
    return tex.group_quantize(torch.cat(parts), quantizer, len(parts), None if alike else torch.tensor(rows))


def alone(tex, part, quantizer):
    return part if quantizer is None or not len(part) else tex.quantize(part, quantizer)


def make(layout, tokens=TOKENS, dtype=torch.bfloat16):
    """A, B and D of every expert: random, columns of different magnitudes."""
    return tuple(
        [torch.randn(shape).mul_(torch.logspace(-2, 2, shape[1])).to(dtype) for shape in part]
        for part in zip(*shapes(layout, tokens), strict=True)
    )


def gemm(te):
    from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm_for_grouped_tensor

    return general_grouped_gemm_for_grouped_tensor


def run(te, tex, layout, case, a, b, d, makers, tokens=TOKENS, **options):
    """The product into copies of D, and these."""
    alike_a, alike_d = layout != "NT", layout == "NT"
    outputs = [part.clone() for part in d]
    if case == "discrete in":
        left = [alone(tex, part, makers[0](te)) for part in a]
    else:
        left = grouped_operand(tex, a, makers[0](te), alike_a)
    right = grouped_operand(tex, b, makers[1](te), False)
    if case == "discrete out":
        gemm(te)(left, right, outputs, layout=layout, **options)
        return outputs
    flat = torch.cat([part.reshape(-1) for part in d])
    written = wrap(flat.view(-1, d[0].shape[1]), None if alike_d else tokens)
    returned = gemm(te)(left, right, written, layout=layout, **options)
    assert returned is written
    return [
        part.view(shape.shape)
        for part, shape in zip(flat.split([part.numel() for part in d]), d, strict=True)
    ]


def one_by_one(te, tex, layout, a, b, d, makers, *, accumulate=False):
    """The products of general_gemm, one expert after the other."""
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    found = []
    for left, right, out in zip(a, b, d, strict=True):
        if 0 in (*left.shape, *right.shape):
            found.append(out.clone() if accumulate else torch.zeros_like(out))
            continue
        target = out.clone()
        general_gemm(
            alone(tex, left, makers[0](te)),
            alone(tex, right, makers[1](te)),
            out_dtype=out.dtype,
            layout=layout,
            out=target,
            accumulate=accumulate,
            use_split_accumulator=True,
        )
        found.append(target)
    return found


def dequantized(tex, part, quantizer, columnwise):
    if quantizer is None:
        return part.double()
    return operands.values(tex.quantize(part, quantizer), columnwise=columnwise).double()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("architecture", "maker", "weights"), FORMATS)
def test_each_product_is_that_of_a_gemm_alone(te, tex, request, architecture, maker, weights, layout, case):
    request.getfixturevalue(architecture)
    tokens = TOKENS if (layout, case) != ("NT", "discrete in") else [128, 128, 256, 128]
    makers = (weights if layout != "NT" else maker, maker)
    a, b, d = make(layout, tokens)
    found = run(te, tex, layout, case, a, b, d, makers, tokens, use_split_accumulator=True)
    expected = one_by_one(te, tex, layout, a, b, d, makers)
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got, wanted)
    for left, right, got in zip(a, b, found, strict=True):
        if 0 in (*left.shape, *right.shape):
            assert not got.any()
            continue
        x = dequantized(tex, left, makers[0](te), layout[0] == "N")
        y = dequantized(tex, right, makers[1](te), layout[1] == "T")
        exact = (y.t() if layout[1] == "T" else y) @ (x.t() if layout[0] == "T" else x)
        torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=float(exact.abs().max()) * 1e-5)


@pytest.mark.parametrize(
    ("layout", "case"), [("TN", "discrete in"), ("NT", "grouped"), ("NT", "discrete out")]
)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accumulates_in_every_output_dtype(te, tex, blackwell, layout, case, out_dtype):
    a, b, d = make(layout)
    a, b = ([part / 100 for part in side] for side in (a, b))
    d = [part.to(out_dtype) for part in d]
    makers = (mxfp8, mxfp8)
    found = run(te, tex, layout, case, a, b, d, makers, accumulate=True)
    expected = one_by_one(te, tex, layout, a, b, d, makers, accumulate=True)
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == out_dtype
        assert torch.equal(got, wanted)


def test_a_factor_for_every_expert(te, tex, blackwell):
    a, b, d = make("TN")
    a, b = ([part.float().sign().bfloat16() for part in side] for side in (a, b))
    d = [part.float().sign().bfloat16() for part in d]
    alpha, beta = torch.tensor([2.0, 3.0, 0.5, -1.0]), torch.tensor([1.0, 1.0, 0.0, 4.0])
    d[2].fill_(float("nan"))  # D is not read where its factor is zero
    found = run(te, tex, "TN", "grouped", a, b, d, (plain, plain), alpha=alpha, beta=beta)
    for number, got in enumerate(found):
        product = b[number].double() @ a[number].double().t()
        wanted = alpha[number] * product + (beta[number] * d[number].double() if beta[number] else 0.0)
        assert torch.equal(got.double(), wanted.bfloat16().double())


@since("2.17")
def test_hopper_has_one_factor_for_all(te, tex, hopper):
    a, b, d = make("TN")
    one = torch.tensor([2.0])
    found = run(te, tex, "TN", "grouped", a, b, d, (plain, plain), alpha=one, beta=torch.zeros(1))
    single = run(te, tex, "TN", "grouped", a, b, d, (plain, plain))
    for got, wanted in zip(found, single, strict=True):
        assert torch.equal(got, wanted * 2)
    four = torch.ones(EXPERTS)
    with pytest.raises(RuntimeError, match=r"alpha must have 1 element\(s\), got 4"):
        run(te, tex, "TN", "grouped", a, b, d, (plain, plain), alpha=four, beta=four)


@pytest.mark.parametrize("case", ["grouped", "discrete in"])
@pytest.mark.parametrize("scaled", [False, pytest.param(True, marks=since("2.17"))])
def test_a_bias_is_added_to_the_rounded_product(te, tex, blackwell, case, scaled):
    a, b, d = make("TN")
    bias = torch.randn(EXPERTS, OUTPUTS).bfloat16()
    scale = torch.rand(sum(TOKENS)) if scaled else None
    options = {"bias": wrap(bias), **({"bias_scale": scale} if scaled else {})}
    found = run(te, tex, "TN", case, a, b, d, (mxfp8, mxfp8), **options)
    without = run(te, tex, "TN", case, a, b, d, (mxfp8, mxfp8))
    factors = torch.ones(sum(TOKENS)) if scale is None else scale
    for number, (got, product, factor) in enumerate(zip(found, without, factors.split(TOKENS), strict=True)):
        wanted = product.double() + bias[number].double() * factor[:, None].double()
        assert torch.equal(got, wanted.float().bfloat16())


@pytest.mark.parametrize(
    ("architecture", "maker"),
    [
        ("blackwell", plain),
        pytest.param("blackwell", tensorwise, marks=since("2.20")),
        pytest.param("hopper", plain, marks=since("2.17")),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_odd_numbers_of_tokens(te, tex, request, architecture, maker, layout):
    request.getfixturevalue(architecture)
    tokens = [33, 0, 7, 1]
    a, b, d = make(layout, tokens)
    found = run(te, tex, layout, "grouped", a, b, d, (maker, maker), tokens)
    expected = one_by_one(te, tex, layout, a, b, d, (maker, maker))
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got, wanted)


@since("2.20")
def test_unaligned_tokens_of_a_transposed_operand(te, tex, hopper):
    """Hopper reads FP8 along k alone, in whole 16 bytes: in wgrad k is the number of tokens."""
    tokens = [33, 0, 7, 1]
    a, b, d = make("NT", tokens)
    with pytest.raises(RuntimeError, match="Leading dimension requirement on A for FP8 GEMM"):
        run(te, tex, "NT", "grouped", a, b, d, (tensorwise, tensorwise), tokens)
    a, b, d = make("TN", tokens)
    run(te, tex, "TN", "grouped", a, b, d, (tensorwise, tensorwise), tokens)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("maker", [plain, mxfp8])
def test_no_tokens_at_all(te, tex, blackwell, maker, accumulate):
    tokens = [0] * EXPERTS
    a, b, d = make("NT", tokens)
    before = [part.clone() for part in d]
    found = run(te, tex, "NT", "discrete out", a, b, d, (maker, maker), tokens, accumulate=accumulate)
    for got, kept in zip(found, before, strict=True):
        assert torch.equal(got, kept if accumulate else torch.zeros_like(kept))
    a, b, d = make("TN", tokens)
    bias = wrap(torch.ones(EXPERTS, OUTPUTS).bfloat16())
    assert [
        part.numel() for part in run(te, tex, "TN", "grouped", a, b, d, (maker, maker), tokens, bias=bias)
    ] == tokens


def test_rows_behind_the_last_expert_are_left_alone(te, tex, blackwell):
    a, b, _ = make("TN")
    spare = torch.full((128, INPUTS), float("nan")).bfloat16()
    x = tex.group_quantize(torch.cat([*b, spare]), _swizzling(te), EXPERTS, torch.tensor(TOKENS))
    out = torch.full((sum(TOKENS) + 128, OUTPUTS), 7.0).bfloat16()
    bias = wrap(torch.ones(EXPERTS, OUTPUTS).bfloat16())
    weights = [tex.quantize(part, mxfp8(te)) for part in a]
    gemm(te)(weights, x, wrap(out, TOKENS), layout="TN", bias=bias)
    assert (out[sum(TOKENS) :] == 7.0).all()
    assert not (out[: sum(TOKENS)] == 7.0).all(dim=1).any()


def _swizzling(te):
    quantizer = mxfp8(te)
    quantizer.optimize_for_gemm = True
    return quantizer


def test_data_that_is_transposed_already(te, tex, blackwell):
    a, b, d = make("TN")
    wanted = run(te, tex, "TN", "grouped", a, b, d, (plain, plain))
    turned = storage()(
        (EXPERTS * OUTPUTS, INPUTS),
        torch.bfloat16,
        num_tensors=EXPERTS,
        columnwise_data=torch.cat([part.t().reshape(-1) for part in a]),
    )
    out = torch.empty(sum(TOKENS), OUTPUTS).bfloat16()
    gemm(te)(turned, wrap(torch.cat(b), TOKENS), wrap(out, TOKENS), layout="TN")
    assert torch.equal(out, torch.cat(wanted))


def test_rows_that_are_no_whole_tiles(te, tex, blackwell):
    """MXFP8 quantises experts of one shape as one matrix, whose scales have no padding between them."""
    rows = 160
    parts = [torch.randn(rows, INPUTS).bfloat16() for _ in range(EXPERTS)]
    group = tex.group_quantize(torch.cat(parts), mxfp8(te), EXPERTS, None)
    x = torch.randn(sum(TOKENS), INPUTS).bfloat16()
    tokens = tex.group_quantize(x, _swizzling(te), EXPERTS, torch.tensor(TOKENS))
    dy = torch.randn(sum(TOKENS), rows).bfloat16()
    out, dx = torch.empty(sum(TOKENS), rows).bfloat16(), torch.empty(sum(TOKENS), INPUTS).bfloat16()
    gemm(te)(group, tokens, wrap(out, TOKENS), layout="TN")
    gradients = tex.group_quantize(dy, _swizzling(te), EXPERTS, torch.tensor(TOKENS))
    gemm(te)(group, gradients, wrap(dx, TOKENS), layout="NN")
    weights = [tex.quantize(part, mxfp8(te)) for part in parts]
    for layout, operand, found in (("TN", tokens, out), ("NN", gradients, dx)):
        wanted = torch.empty_like(found)
        gemm(te)(weights, operand, wrap(wanted, TOKENS), layout=layout)
        assert torch.equal(found, wanted)


def test_every_product_is_recorded(te, tex, blackwell):
    a, b, d = make("NT")
    with emulation.trace() as seen:
        run(te, tex, "NT", "discrete out", a, b, d, (mxfp8, mxfp8), accumulate=True)
    assert [(each.m, each.n, each.k) for each in seen.gemms] == [
        (INPUTS, OUTPUTS, rows) for rows in TOKENS if rows
    ]
    assert {(each.layout, each.a.scaling, each.b.usage) for each in seen.gemms} == {
        ("NT", "mxfp8", "columnwise")
    }
    assert all(each.accumulate for each in seen.gemms)


def refused(te, tex, message, *, case="grouped", makers=(plain, plain), out=torch.bfloat16, **options):
    a, b, d = make("TN")
    d = [part.to(out) for part in d]
    with pytest.raises(RuntimeError, match=message):
        run(te, tex, "TN", case, a, b, d, makers, **options)


def test_operands_that_do_not_fit(te, tex, blackwell):
    refused(te, tex, "A and B must both be FP8 or both be non-FP8", makers=(plain, mxfp8))
    low = "A and B must both be (low-precision|FP8)"
    refused(te, tex, low, case="discrete in", makers=(mxfp8, plain))
    a, b, d = make("TN")
    with pytest.raises(RuntimeError, match=r"must be FP8, .*BF16, or FP16, got Float32"):
        run(te, tex, "TN", "grouped", *([p.float() for p in side] for side in (a, b, d)), (plain, plain))
    with pytest.raises(RuntimeError, match="Unable to find suitable cuBLAS"):
        run(te, tex, "TN", "grouped", a, [p.half() for p in b], d, (plain, plain))


@since("2.17")
def test_nvfp4_has_limits_of_its_own(te, tex, blackwell):
    refused(te, tex, "FP4 GEMM does not support FP16 output!", makers=(nvfp4, nvfp4), out=torch.float16)
    a, b, d = make("TN")
    x = torch.cat(b)
    group = tex.group_quantize(x, nvfp4(te), EXPERTS, torch.tensor(TOKENS))
    weights = [tex.quantize(part, nvfp4(te)) for part in a]
    out = wrap(torch.cat(d), TOKENS)
    with pytest.raises(RuntimeError, match="scales must be swizzled"):
        gemm(te)(weights, group, out, layout="TN")
    ready = grouped_operand(tex, b, nvfp4(te), False)
    ready.amax = None
    with pytest.raises(RuntimeError, match="NVFP4 B is missing amax"):
        gemm(te)(weights, ready, out, layout="TN")
    weights[2]._amax_rowwise = None
    with pytest.raises(RuntimeError, match="NVFP4 A_list tensor 2 is missing amax"):
        gemm(te)(weights, grouped_operand(tex, b, nvfp4(te), False), out, layout="TN")


def test_missing_directions(te, tex, blackwell):
    a, b, d = make("NT")
    rows = mxfp8(te, columnwise=False)
    rows.optimize_for_gemm = True
    only = tex.group_quantize(torch.cat(a), rows, EXPERTS, torch.tensor(TOKENS))
    other = grouped_operand(tex, b, mxfp8(te), False)
    with pytest.raises(RuntimeError, match="MXFP8 non-transposed A is missing column-wise data"):
        gemm(te)(only, other, d, layout="NT")
    with pytest.raises(RuntimeError, match="MXFP8 transposed B is missing column-wise data"):
        gemm(te)(other, only, [part.t().contiguous() for part in d], layout="NT")


@since("2.20")
def test_block_scaling_is_hoppers(te, tex, hopper, pose):
    refused(te, tex, "got 2D by 2D", makers=(square_blocks, square_blocks))
    a, b, d = make("TN")
    left = grouped_operand(tex, a, square_blocks(te), True)
    right = grouped_operand(tex, b, blockwise(te), False)
    pose((10, 0))
    with pytest.raises(RuntimeError, match="only supported on Hopper"):
        gemm(te)(left, right, wrap(torch.cat(d), TOKENS), layout="TN")


def test_numbers_of_matrices(te, tex, blackwell):
    a, b, d = make("TN")
    with pytest.raises(RuntimeError, match="A_list to have num_tensors elements"):
        gemm(te)(a[:3], wrap(torch.cat(b), TOKENS), wrap(torch.cat(d), TOKENS), layout="TN")
    many = [torch.ones(16, 16).bfloat16()] * 65
    rows = [16] * 65
    x = wrap(torch.ones(16 * 65, 16).bfloat16(), rows)
    with pytest.raises(RuntimeError, match="A_list supports up to 64 tensors per kernel, got 65"):
        gemm(te)(many, x, wrap(torch.ones(16 * 65, 16).bfloat16(), rows), layout="TN")


def test_outputs_that_do_not_fit(te, tex, blackwell):
    refused(te, tex, "outputs must be BF16, FP16, or FP32", out=torch.float64)
    a, b, _ = make("TN")
    out = wrap(torch.zeros(sum(TOKENS), OUTPUTS + 8).bfloat16(), TOKENS)
    with pytest.raises(RuntimeError, match="and the product"):
        gemm(te)(wrap(torch.cat(a)), wrap(torch.cat(b), TOKENS), out, layout="TN")
    a, b, d = make("NT")
    d[2] = d[2].float()
    with pytest.raises(RuntimeError, match=r"D_list tensor 2 dtype mismatch\. Expected BFloat16 got Float32"):
        run(te, tex, "NT", "discrete out", a, b, d, (plain, plain))


def test_biases_that_do_not_fit(te, tex, blackwell):
    def biased(message, bias, **options):
        refused(te, tex, message, bias=bias, **options)

    half = torch.ones(EXPERTS, OUTPUTS).half()
    biased("output and bias must have matching dtypes", wrap(half))
    wide = torch.ones(EXPERTS, OUTPUTS * 2).bfloat16()
    biased("output and bias last dims must match", wrap(wide))
    tall = torch.ones(EXPERTS * 2, OUTPUTS).bfloat16()
    biased("bias first dim must be 1", wrap(tall))
    if RELEASE != "2.14":
        good = wrap(torch.ones(EXPERTS, OUTPUTS).bfloat16())
        biased(r"scale size \(3\) must equal total rows \(512\)", good, bias_scale=torch.ones(3))
        biased("scale must be float32", good, bias_scale=torch.ones(512).bfloat16())


def multiply_grouped(tex, *, experts, setup_bytes):
    """The GEMM over grouped tensors with factors for `experts` of them."""
    a, b, d = make("TN")
    factors = torch.ones(experts)
    tex.te_general_grouped_gemm_for_grouped_tensor(
        wrap(torch.cat(a)),
        True,
        wrap(torch.cat(b), TOKENS),
        False,
        wrap(torch.cat(d), TOKENS),
        None,
        None,
        factors,
        factors,
        torch.empty(setup_bytes, dtype=torch.uint8),
        torch.empty(33 << 20, dtype=torch.uint8),
        True,
        0,
    )


@since("2.17")
def test_an_architecture_without_grouped_gemms(te, tex, pose):
    pose((12, 0))
    with pytest.raises(RuntimeError, match=r"requires Hopper \(SM90\) or Blackwell"):
        multiply_grouped(tex, experts=1, setup_bytes=4096)
    with pytest.raises(RuntimeError, match=r"requires Hopper \(SM90\) or Blackwell"):
        multiply_grouped(tex, experts=EXPERTS, setup_bytes=4096)


@since("2.17")
@pytest.mark.parametrize(("experts", "size"), [(1, 7 * 16 + 8 + 28 + 256), (4, 8 * 32 + 28 * 4 + 256)])
def test_workspaces(te, tex, blackwell, experts, size):
    assert tex.get_grouped_gemm_setup_workspace_size(experts) == size
    with pytest.raises(
        RuntimeError, match=r"Insufficient Grouped GEMM setup workspace\. Required: 624 bytes"
    ):
        multiply_grouped(tex, experts=EXPERTS, setup_bytes=8)
