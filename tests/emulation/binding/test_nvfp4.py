"""NVFP4 behind TE's own quantizer and modules, against the reference quantizer that TE installs in Python."""

from __future__ import annotations

import pytest
import torch

from nemo_fp8_recipes import emulation
from tests.support.te_release import RELEASE, nvfp4_reference, since
from tests.support.te_release import reference as te_reference

pytestmark = pytest.mark.usefixtures("blackwell")

TOKENS, INPUTS, OUTPUTS = 192, 256, 128


@pytest.fixture
def quantizer(te):
    from transformer_engine.pytorch.tensor.nvfp4_tensor import NVFP4Quantizer

    def make(**options):
        if options.get("with_rht"):
            options.setdefault("with_post_rht_amax", True)
        return NVFP4Quantizer(**options)

    return make


@pytest.fixture
def reference(te):
    return nvfp4_reference


@pytest.fixture
def recipe(te):
    from transformer_engine.common.recipe import NVFP4BlockScaling

    return NVFP4BlockScaling


def values(packed, scale, amax):
    """float64 values of the reference's buffers, decoded by the reference's own table."""
    codes = te_reference("nvfp4").cast_from_fp4x2(packed, torch.float64)
    return codes * scale.double().repeat_interleave(16, dim=1) * (amax.double().view(-1, 1) / 2688.0)


def swizzled_by_cublas(scales: torch.Tensor) -> torch.Tensor:
    """cuBLAS's documented offset of every scale in tiles of 128 x 4."""
    rows, columns = scales.shape
    out = torch.empty(rows * columns, dtype=torch.uint8)
    for row in range(rows):
        for column in range(columns):
            tile = (row // 128) * (columns // 4) + column // 4
            out[tile * 512 + (row % 32) * 16 + (row % 128 // 32) * 4 + column % 4] = scales[row, column]
    return out.view(rows, columns)


CASES = {
    "1x16": ({}, {}),
    "16x16": ({"with_2d_quantization": True}, {"quant_tile_shape": (16, 16)}),
    "hadamard": ({"with_rht": True}, {"with_rht": True}),
    "hadamard without signs": (
        {"with_rht": True, "with_random_sign_mask": False},
        {"with_rht": True, "with_random_sign_mask": False},
    ),
    "row-scaled": ({"row_scaled_nvfp4": True}, {"row_scaled_nvfp4": True}),
}
FOUR_OVER_SIX = {
    "1x16": {},
    "16x16, mean square": {"with_2d_quantization": True, "nvfp4_4over6_err_mode": "MSE"},
    "256": {"nvfp4_e4m3_max": 256},
    "row-scaled": {"row_scaled_nvfp4": True, "columnwise": False, "nvfp4_e4m3_max": 256},
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[since("2.20")] if case == "row-scaled" else []) for case in CASES]
)
@pytest.mark.parametrize("shape", [(64, 128), (4, 24, 96), (160, 32)], ids=str)
def test_buffers_equal_the_reference(tex, quantizer, reference, case, shape):
    options, reference_options = CASES[case]
    x = torch.randn(shape).bfloat16()
    found = tex.quantize(x, quantizer(**options))
    expected = reference(**reference_options).quantize(x)
    m, k = x.numel() // shape[-1], shape[-1]
    assert found.shape == x.shape
    assert found._rowwise_data.shape == (*shape[:-1], k // 2)
    assert torch.equal(found._rowwise_data.view(m, -1), expected.data)
    assert torch.equal(found._columnwise_data, expected.data_t)
    assert torch.equal(found._amax_rowwise, expected.global_amax_row.view(-1))
    assert torch.equal(found._amax_columnwise, expected.global_amax_col.view(-1))
    for scales, natural in (
        (found._rowwise_scale_inv, expected.scale),
        (found._columnwise_scale_inv, expected.scale_t),
    ):
        rows, columns = natural.shape
        assert scales.shape == (-(-rows // 128) * 128, -(-columns // 4) * 4)
        assert torch.equal(scales[:rows, :columns], natural.view(torch.uint8))
        assert not scales[rows:].any()
        assert not scales[:, columns:].any()
    decoded = found.dequantize(dtype=torch.float32).view(m, k)
    torch.testing.assert_close(
        decoded.double(), values(expected.data, expected.scale, expected.global_amax_row), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("fast", [False, True], ids=["exact error", "fast error"])
@pytest.mark.parametrize("case", FOUR_OVER_SIX)
@since("2.17")
def test_four_over_six_equals_the_reference(tex, quantizer, reference, monkeypatch, case, fast):
    monkeypatch.setenv("NVTE_NVFP4_4OVER6_ERR_USE_FAST_MATH", str(int(fast)))
    options = {"nvfp4_use_4over6": True, **FOUR_OVER_SIX[case]}
    theirs = {name: value for name, value in options.items() if name not in ("with_2d_quantization",)}
    if options.get("with_2d_quantization"):
        theirs["quant_tile_shape"] = (16, 16)
    x = torch.randn(96, 160).bfloat16()
    x[:16] *= 300.0
    x[3, 16:32] = 0.0
    made = quantizer(**options)
    found = tex.quantize(x, made)
    expected = reference(**theirs, nvfp4_4over6_err_use_fast_math=fast).quantize(x)
    assert torch.equal(found._rowwise_data, expected.data)
    assert torch.equal(found._rowwise_scale_inv[:96, :10], expected.scale.view(torch.uint8))
    if made.columnwise_usage:
        assert torch.equal(found._columnwise_data, expected.data_t)
        assert torch.equal(found._columnwise_scale_inv[:160, :6], expected.scale_t.view(torch.uint8))
    plain = tex.quantize(
        x, quantizer(**{name: value for name, value in options.items() if not name.startswith("nvfp4_")})
    )
    error, without = ((each.dequantize().double() - x.double()).square().sum() for each in (found, plain))
    assert error < without


@since("2.17")
def test_four_over_six_refuses_what_its_kernel_does(tex, quantizer):
    x = torch.randn(64, 64).bfloat16()
    for options, says in (
        ({"with_rht": True}, "does not support RHT"),
        ({"stochastic_rounding": True}, "does not support stochastic rounding"),
        ({"row_scaled_nvfp4": True}, "not supported with 4over6 mode"),
        ({"with_2d_quantization": True, "rowwise": False}, "requires rowwise output"),
    ):
        with pytest.raises(RuntimeError, match=says):
            tex.quantize(x, quantizer(nvfp4_use_4over6=True, **options))
    made = quantizer()
    made.nvfp4_e4m3_max = 256
    with pytest.raises(RuntimeError, match="requires E4M3 max 448"):
        tex.quantize(x, made)


@pytest.mark.parametrize("direction", ["rowwise", "columnwise"])
def test_one_direction_alone_is_that_of_both(tex, quantizer, direction):
    x = torch.randn(64, 96).bfloat16()
    both = tex.quantize(x, quantizer(with_rht=True))
    alone = tex.quantize(
        x, quantizer(with_rht=True, rowwise=direction == "rowwise", columnwise=direction == "columnwise")
    )
    other = "columnwise" if direction == "rowwise" else "rowwise"
    for name in (f"_{direction}_data", f"_{direction}_scale_inv", f"_amax_{direction}"):
        assert torch.equal(getattr(alone, name), getattr(both, name))
    for name in (f"_{other}_data", f"_{other}_scale_inv", f"_amax_{other}"):
        assert getattr(alone, name) is None


@pytest.mark.parametrize(
    ("options", "shape", "swizzled", "releases"),
    [
        ({"with_rht": True}, (64, 128), True, ("2.17", "2.20")),
        ({"with_rht": True}, (32, 128), False, ()),
        ({"with_2d_quantization": True}, (128, 256), True, ("2.20",)),
        ({"with_2d_quantization": True}, (64, 128), False, ()),
        ({}, (128, 128), False, ()),
    ],
    ids=str,
)
@since("2.17")
def test_scales_are_swizzled_by_the_fused_kernels_or_after_them(
    tex, quantizer, options, shape, swizzled, releases
):
    if RELEASE not in releases:
        swizzled = False
    x = torch.randn(shape).bfloat16()
    plain = tex.quantize(x, quantizer(**options))
    for_gemm = quantizer(**options)
    for_gemm.optimize_for_gemm = True
    found = tex.quantize(x, for_gemm)
    assert for_gemm.make_empty(shape, dtype=torch.bfloat16)._with_gemm_swizzled_scales is swizzled
    assert found._with_gemm_swizzled_scales  # by the kernel, or by a pass of its own
    for name in ("_rowwise_scale_inv", "_columnwise_scale_inv"):
        assert torch.equal(getattr(found, name), swizzled_by_cublas(getattr(plain, name)))
    assert torch.equal(found.dequantize(), plain.dequantize())


def test_quantising_into_an_existing_tensor_writes_its_buffers(tex, quantizer):
    x, y = torch.randn(64, 96).bfloat16(), torch.randn(64, 96).bfloat16()
    target = tex.quantize(x, quantizer())
    buffer = target._rowwise_data
    tex.quantize(y, quantizer(), target)
    fresh = tex.quantize(y, quantizer())
    assert target._rowwise_data is buffer
    for name in ("_rowwise_data", "_columnwise_data", "_columnwise_scale_inv", "_amax_rowwise"):
        assert torch.equal(getattr(target, name), getattr(fresh, name))
    tex.quantize(x, quantizer(columnwise=False), target, torch.ones(1))  # a noop flag that is set
    assert torch.equal(target._rowwise_data, fresh._rowwise_data)
    assert target._columnwise_data is None


def test_what_tes_kernels_refuse(tex, quantizer):
    with pytest.raises(RuntimeError, match="divisible by 16"):
        tex.quantize(torch.ones(16, 24).bfloat16(), quantizer())
    with pytest.raises(RuntimeError, match="First dim for NVFP4 must be divisible by 16"):
        tex.quantize(torch.ones(8, 32).bfloat16(), quantizer())
    with pytest.raises(RuntimeError, match="RHT is only supported for bfloat16 input"):
        tex.quantize(torch.ones(16, 32), quantizer(with_rht=True))
    with pytest.raises(RuntimeError, match="Pre-RHT amax is not supported"):
        tex.quantize(torch.ones(16, 32).bfloat16(), quantizer(with_rht=True, with_post_rht_amax=False))


@since("2.17")
def test_what_the_row_scaled_kernels_refuse(tex, quantizer):
    with pytest.raises(RuntimeError, match="does not support stochastic rounding"):
        tex.quantize(
            torch.ones(32, 32).bfloat16(), quantizer(row_scaled_nvfp4=True, stochastic_rounding=True)
        )


@pytest.mark.skipif(RELEASE != "2.17", reason="2.17 has row-scaled NVFP4 and no columnwise data of it")
def test_row_scaled_columns_are_refused_before_their_release(tex, quantizer):
    x = torch.ones(32, 32).bfloat16()
    with pytest.raises(RuntimeError, match="does not support columnwise usage"):
        tex.quantize(x, quantizer(row_scaled_nvfp4=True))
    assert tex.quantize(x, quantizer(row_scaled_nvfp4=True, columnwise=False))._amax_rowwise.shape == (32,)


def test_square_blocks_of_columns_alone(tex, quantizer):
    x = torch.randn(32, 64).bfloat16()
    alone = quantizer(with_2d_quantization=True, rowwise=False)
    if RELEASE in ("2.11", "2.14"):
        with pytest.raises(RuntimeError, match="only supported when return_identity is true"):
            tex.quantize(x, alone)
        return
    both = tex.quantize(x, quantizer(with_2d_quantization=True))
    assert torch.equal(tex.quantize(x, alone)._columnwise_data, both._columnwise_data)


def test_what_is_not_emulated_names_itself(tex, quantizer, monkeypatch):
    x = torch.ones(32, 32).bfloat16()
    monkeypatch.setenv("NVTE_USE_FAST_MATH", "1")
    with pytest.raises(NotImplementedError, match="NVTE_USE_FAST_MATH"):
        tex.quantize(x, quantizer())


def test_a_gpu_before_blackwell_has_no_nvfp4(tex, quantizer, hopper):
    with pytest.raises(RuntimeError, match=r"compute capability 10\.0"):
        tex.quantize(torch.ones(32, 32).bfloat16(), quantizer())


def near(found: torch.Tensor, expected: torch.Tensor):
    error = (found.detach().double() - expected).abs()
    assert (error <= 2.0**-8 * expected.abs() + 1e-6 * expected.abs().max()).all(), error.max()


@pytest.mark.parametrize("rht", [True, False], ids=["hadamard", "plain"])
@pytest.mark.parametrize("kind", ["Linear", "LayerNormLinear"])
def test_a_layer_multiplies_what_the_reference_quantises(te, reference, recipe, kind, rht):
    torch.manual_seed(11)
    module = getattr(te, kind)(INPUTS, OUTPUTS, params_dtype=torch.bfloat16, bias=True)
    module.bias.data.normal_()
    x = torch.randn(TOKENS, INPUTS).bfloat16().requires_grad_()
    grad = torch.randn(TOKENS, OUTPUTS).bfloat16()
    with emulation.trace() as trace:
        with te.autocast(recipe=recipe(disable_stochastic_rounding=True, disable_rht=not rht)):
            y = module(x)
        y.backward(grad)

    normalised = x.detach()
    if kind == "LayerNormLinear":
        normalised = torch.nn.functional.layer_norm(x.detach().float(), (INPUTS,)).bfloat16()
    qx, qg = (reference(with_rht=rht).quantize(each) for each in (normalised, grad))
    qw = reference(quant_tile_shape=(16, 16)).quantize(module.weight.detach())
    x_rows, grad_rows, weight_rows = (values(q.data, q.scale, q.global_amax_row) for q in (qx, qg, qw))
    x_columns, grad_columns, weight_columns = (
        values(q.data_t, q.scale_t, q.global_amax_col) for q in (qx, qg, qw)
    )
    near(y, x_rows @ weight_rows.t() + module.bias.double())
    near(module.weight.grad, grad_columns @ x_columns.t())
    near(module.bias.grad, grad.double().sum(0))
    if kind == "Linear":
        near(x.grad, grad_rows @ weight_columns.t())
    assert [record.layout for record in trace.gemms] == ["TN", "NN", "NT"]
    assert {(record.a.format, record.b.scaling) for record in trace.gemms} == {("e2m1", "nvfp4")}


def test_gradients_are_rounded_stochastically_from_the_seeded_generator(te, recipe):
    weight = torch.randn(OUTPUTS, INPUTS).bfloat16()
    x = torch.randn(TOKENS, INPUTS).bfloat16()
    grad = torch.randn(TOKENS, OUTPUTS).bfloat16()

    def input_gradient(seed: int, **options) -> torch.Tensor:
        # A new module for every recipe: TE keeps the quantizers of the first.
        module = te.Linear(INPUTS, OUTPUTS, params_dtype=torch.bfloat16, bias=False)
        module.weight.data.copy_(weight)
        source = x.clone().requires_grad_()
        with te.autocast(recipe=recipe(**options)):
            y = module(source)
        torch.manual_seed(seed)
        y.backward(grad)
        return source.grad.double()

    nearest = input_gradient(0, disable_stochastic_rounding=True)
    draws = [input_gradient(seed) for seed in range(24)]
    assert torch.equal(draws[0], input_gradient(0))
    assert not torch.equal(draws[0], draws[1])
    mean = torch.stack(draws).mean(0)
    spread = torch.stack(draws).std(0).mean()
    others = torch.stack(draws[12:]).mean(0) - torch.stack(draws[:12]).mean(0)
    assert others.abs().mean() < 0.5 * spread  # the draws scatter around one mean
    assert (mean - nearest).abs().mean() < (draws[0] - nearest).abs().mean()


@since("2.17")
def test_row_scaled_activations(te, recipe, reference):
    module = te.Linear(INPUTS, OUTPUTS, params_dtype=torch.bfloat16, bias=False)
    x = torch.randn(TOKENS, INPUTS).bfloat16() * torch.logspace(-3, 3, TOKENS).bfloat16()[:, None]
    with torch.no_grad(), te.autocast(recipe=recipe(row_scaled_activation=True, disable_rht=True)):
        y = module(x)
    qx = reference(row_scaled_nvfp4=True, columnwise=False).quantize(x)
    qw = reference(quant_tile_shape=(16, 16)).quantize(module.weight.detach())
    near(y, values(qx.data, qx.scale, qx.global_amax_row) @ values(qw.data, qw.scale, qw.global_amax_row).t())


def test_inner_dimensions_that_cublas_does_not_take(te, recipe):
    module = te.Linear(48, 64, params_dtype=torch.bfloat16)
    with (
        te.autocast(recipe=recipe()),
        pytest.raises(RuntimeError, match=r"suitable cuBLAS GEMM algorithm .*k=48"),
    ):
        module(torch.randn(64, 48).bfloat16())


@since("2.20")
def test_an_empty_tensor_has_an_amax_of_zero(tex, quantizer):
    for _ in range(3):
        torch.full((64,), torch.nan)  # memory that would be seen where nothing is written
        found = tex.quantize(torch.empty(0, 64).bfloat16(), quantizer(row_scaled_nvfp4=True))
        assert not found._amax_columnwise.any()
        assert found._amax_columnwise.shape == (64,)
