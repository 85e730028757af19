"""generic_gemm: epilogues, accumulation, rounding, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nemo_fp8_recipes import emulation
from tests.emulation.binding import oracle
from tests.emulation.binding.test_quantize import blockwise, delayed, mxfp8, tensorwise

BF16, FP32 = torch.bfloat16, torch.float32


def gemm(
    te,
    tex,
    a,
    b,
    layout="TN",
    *,
    out=None,
    quantizer=None,
    dtype=FP32,
    bias=None,
    gelu=False,
    gelu_in=None,
    grad=False,
    accumulate=False,
    split_accumulator=True,
    **scales,
):
    tag = {FP32: te.DType.kFloat32, BF16: te.DType.kBFloat16}[dtype]
    return tex.generic_gemm(
        a, layout[0] == "T", b, layout[1] == "T", out, quantizer, tag, bias, te.DType.kBFloat16, gelu,
        gelu_in, grad, torch.empty(0), 0, accumulate, split_accumulator, **scales,
    )  # fmt: skip


def test_layouts(te, tex):
    a, b = torch.randn(16, 32), torch.randn(24, 32)
    assert torch.equal(gemm(te, tex, a, b, "TN")[0], b @ a.t())
    assert torch.equal(gemm(te, tex, a.t().contiguous(), b, "NN")[0], b @ a.t())
    wgrad = gemm(te, tex, torch.randn(8, 16), torch.randn(8, 24), "NT")[0]
    assert wgrad.shape == (24, 16)


def test_outer_dimensions_of_b_are_kept(te, tex):
    a, b = torch.randn(16, 32), torch.randn(3, 5, 32)
    out = gemm(te, tex, a, b)[0]
    torch.testing.assert_close(out, b @ a.t())
    dw = gemm(te, tex, b, torch.randn(3, 5, 16), "NT")[0]
    assert dw.shape == (16, 32)


def test_accumulation_adds_before_it_rounds(te, tex):
    # A product just below the tie 1 + 2^-8 rounds to 1 by itself; with 2^-8 added first it rounds up.
    a = torch.full((1, 1), 1.0)
    b = torch.tensor([[1.00390625 - 2**-12]])
    out = torch.full((1, 1), 2.0**-8, dtype=BF16)
    exact = (b.double() + 2.0**-8).float().to(BF16)
    rounded_first = b.to(BF16) + out
    assert exact != rounded_first
    result = gemm(te, tex, a, b, out=out, dtype=BF16, accumulate=True)[0]
    assert result.data_ptr() == out.data_ptr()
    assert torch.equal(out, exact)


def test_block_scaling_on_hopper_rounds_before_it_accumulates(te, tex, hopper):
    # As the reference in TE's own tests has it: the product is rounded to bf16 by itself, and so is the sum.
    a, b = (tex.quantize(torch.randn(128, 128), blockwise(te)) for _ in range(2))
    out = torch.randn(128, 128).to(BF16)
    product = gemm(te, tex, a, b)[0]
    twice = product.to(BF16) + out
    assert not torch.equal(twice, (product + out.float()).to(BF16))
    assert torch.equal(gemm(te, tex, a, b, out=out.clone(), dtype=BF16, accumulate=True)[0], twice)


def test_alpha_and_beta(te, tex):
    a, b = torch.randn(8, 16), torch.randn(4, 16)
    out = torch.randn(4, 8)
    expected = 0.5 * (b @ a.t()) + 2.0 * out
    torch.testing.assert_close(
        gemm(te, tex, a, b, out=out, accumulate=True, alpha=0.5, beta=2.0)[0], expected
    )
    with pytest.raises(RuntimeError, match="Beta has nothing to be applied to"):
        gemm(te, tex, a, b, beta=1.0)


def test_bias_and_gelu(te, tex):
    a, b, bias = torch.randn(8, 16), torch.randn(4, 16), torch.randn(8)
    out, bias_grad, pre_gelu, _ = gemm(te, tex, a, b, bias=bias, gelu=True)
    linear = b @ a.t() + bias
    assert bias_grad is None
    torch.testing.assert_close(pre_gelu, linear)
    torch.testing.assert_close(out, torch.nn.functional.gelu(linear, approximate="tanh"))


def test_gelu_backward_uses_the_saved_input(te, tex):
    a, dy = torch.randn(8, 16), torch.randn(4, 8)
    saved = torch.randn(4, 16, requires_grad=True)
    torch.nn.functional.gelu(saved, approximate="tanh").backward(dy @ a)
    out, _, _, _ = gemm(te, tex, a, dy, "NN", grad=True, gelu=True, gelu_in=saved.detach())
    torch.testing.assert_close(out, saved.grad, rtol=1e-4, atol=1e-5)


def test_bias_gradient_is_the_sum_of_b(te, tex):
    x, dy = torch.randn(32, 16, dtype=BF16), torch.randn(32, 8, dtype=BF16)
    out, bias_grad, _, _ = gemm(te, tex, x, dy, "NT", grad=True, bias=torch.empty(8), dtype=BF16)
    assert out.shape == (8, 16)
    np.testing.assert_allclose(oracle.array(bias_grad), oracle.array(dy).sum(0), rtol=2**-8, atol=1e-6)


def test_quantised_output(te, tex):
    a, b = torch.randn(32, 64, dtype=BF16), torch.randn(32, 64, dtype=BF16)
    exact = oracle.array(b) @ oracle.array(a).T
    result = gemm(te, tex, a, b, quantizer=tensorwise(te), dtype=BF16)[0]
    expected = oracle.per_tensor(torch.from_numpy(exact).to(BF16), "e4m3")
    assert (result._data.numpy() != expected.codes).mean() < 0.01
    assert result.dtype == BF16


def test_delayed_output_of_an_fp8_gemm_is_cast_from_fp32(te, tex):
    qa = tex.quantize(torch.randn(32, 64), tensorwise(te))
    qb = tex.quantize(torch.randn(32, 64), tensorwise(te))
    high = gemm(te, tex, qa, qb)[0]
    output = delayed(te, scale=2.0)
    result = gemm(te, tex, qa, qb, quantizer=output, dtype=BF16)[0]
    np.testing.assert_array_equal(result._data.numpy(), oracle.per_tensor(high, "e4m3", 2.0).codes)
    assert output.amax.item() == high.abs().max().item()


@pytest.mark.parametrize("shape", [((0, 32), (16, 32)), ((16, 32), (0, 32)), ((16, 0), (8, 0))])
def test_empty_operands(te, tex, shape):
    a, b = torch.randn(shape[0]), torch.randn(shape[1])
    out = gemm(te, tex, a, b)[0]
    assert out.shape == (b.shape[0], a.shape[0])
    assert not out.any()
    kept = torch.ones(b.shape[0], a.shape[0])
    assert gemm(te, tex, a, b, out=kept, accumulate=True)[0].eq(1).all()


def test_shapes_that_do_not_fit(te, tex):
    with pytest.raises(RuntimeError, match=r"Invalid matrix dimensions for GEMM \(A=\(8,16\), transa=1"):
        gemm(te, tex, torch.randn(8, 16), torch.randn(4, 12))
    with pytest.raises(RuntimeError, match="GEMM output has invalid dims"):
        gemm(te, tex, torch.randn(8, 16), torch.randn(4, 16), out=torch.zeros(4, 9))
    with pytest.raises(RuntimeError, match="GEMM output has invalid dtype"):
        gemm(te, tex, torch.randn(8, 16), torch.randn(4, 16), out=torch.zeros(4, 8, dtype=BF16))


def test_hopper_reads_transposed_data_only(te, tex, hopper):
    rowwise = tensorwise(te)
    rowwise.set_usage(rowwise=True, columnwise=False)
    a, b = tex.quantize(torch.randn(32, 64), rowwise), tex.quantize(torch.randn(32, 32), rowwise)
    with pytest.raises(RuntimeError, match="Input A is missing column-wise usage"):
        gemm(te, tex, a, b, "NN")


def test_blackwell_reads_any_layout(te, tex, blackwell):
    a, b = torch.randn(32, 64), torch.randn(32, 32)
    rowwise = tensorwise(te)
    rowwise.set_usage(rowwise=True, columnwise=False)
    out = gemm(te, tex, tex.quantize(a, rowwise), tex.quantize(b, rowwise), "NN")[0]
    expected = oracle.per_tensor(b, "e4m3").values @ oracle.per_tensor(a, "e4m3").values
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_stale_transposes_are_not_read(te, tex, hopper):
    a = tex.quantize(torch.randn(32, 64), tensorwise(te))
    b = tex.quantize(torch.randn(32, 32), tensorwise(te))
    a._transpose_invalid = True
    with pytest.raises(RuntimeError, match="Input A is missing column-wise usage"):
        gemm(te, tex, a, b, "NN")


def test_leading_dimensions(te, tex, hopper):
    a, b = torch.randn(32, 24), torch.randn(32, 24)
    with pytest.raises(RuntimeError, match="Leading dimension requirement on A for FP8 GEMM"):
        gemm(te, tex, tex.quantize(a, tensorwise(te)), tex.quantize(b, tensorwise(te)))
    with pytest.raises(RuntimeError, match="Leading dimension requirement on NVTE_BLOCK_SCALING GEMM"):
        gemm(te, tex, tex.quantize(a, blockwise(te)), tex.quantize(b, blockwise(te)))
    with pytest.raises(RuntimeError, match="Outer dimension requirement on A for NVTE_BLOCK_SCALING"):
        gemm(te, tex, tex.quantize(torch.randn(20, 32), blockwise(te)),
             tex.quantize(torch.randn(32, 32), blockwise(te)))  # fmt: skip


def test_formats_that_cublas_does_not_multiply(te, tex, hopper):
    x = torch.randn(128, 128)
    square = tex.quantize(x, blockwise(te, dim=2))
    with pytest.raises(RuntimeError, match="but got 2D by 2D"):
        gemm(te, tex, square, square)
    with pytest.raises(RuntimeError, match="compatible scaling modes"):
        gemm(te, tex, tex.quantize(x, mxfp8(te)), tex.quantize(x, tensorwise(te)))
    e5m2 = tex.quantize(x, tensorwise(te, "e5m2"))
    with pytest.raises(
        RuntimeError, match=r"CUBLAS_STATUS_NOT_SUPPORTED\. Unable to find suitable cuBLAS GEMM"
    ):
        gemm(te, tex, e5m2, e5m2)
    rows = tex.quantize(x, blockwise(te))
    with pytest.raises(RuntimeError, match="Unable to find suitable cuBLAS GEMM algorithm"):
        gemm(te, tex, rows, square, split_accumulator=False)
    with pytest.raises(RuntimeError, match="Epilogue requested outside"):
        gemm(te, tex, rows, square, bias=x[0].to(BF16), gelu=True, gelu_in=x, grad=True)
    with pytest.raises(RuntimeError, match="unsupported value or parameter was passed"):
        gemm(te, tex, rows, square, gelu=True, gelu_in=x, grad=True)
    with pytest.raises(RuntimeError, match="Unable to find suitable cuBLAS GEMM algorithm"):
        gemm(te, tex, e5m2, x.to(BF16))
    with pytest.raises(RuntimeError, match="Epilogue requested outside"):
        gemm(te, tex, tex.quantize(x, blockwise(te)), square, gelu=True)


def test_mxfp8_usages(te, tex):
    quantizer = mxfp8(te)
    quantizer.set_usage(rowwise=True, columnwise=False)
    x = tex.quantize(torch.randn(32, 32), quantizer)
    with pytest.raises(RuntimeError, match="Input B is missing column-wise usage"):
        gemm(te, tex, tex.quantize(torch.randn(32, 32), mxfp8(te)), x, "NT")


def test_communication_overlap_names_itself(te, tex):
    a = torch.randn(8, 16)
    with pytest.raises(NotImplementedError, match="generic_gemm with communication overlap is not emulated"):
        gemm(te, tex, a, a, comm_overlap=object())


def test_grouped_gemm(te, tex):
    weights = [torch.randn(16, 32) for _ in range(3)]
    splits = [8, 0, 24]
    inputs = list(torch.randn(32, 32).split(splits))
    out = torch.zeros(32, 16)
    biases = [torch.randn(16) for _ in range(3)]
    tex.te_general_grouped_gemm(
        weights, True, inputs, False, [out], te.DType.kFloat32, splits, biases, te.DType.kBFloat16, True,
        [torch.empty(0)] * 3, False, [torch.empty(0)], 0, False, False, 0,
    )  # fmt: skip
    expected = torch.cat([x @ w.t() + b for x, w, b in zip(inputs, weights, biases, strict=True)])
    torch.testing.assert_close(out, expected)


def test_trace_records_what_was_multiplied(te, tex):
    a, b = tex.quantize(torch.randn(32, 64), mxfp8(te)), tex.quantize(torch.randn(96, 64), mxfp8(te, "e5m2"))
    gemm(te, tex, a, b)
    with emulation.trace() as outer:
        gemm(te, tex, a, b, dtype=BF16)
        with emulation.trace() as inner:
            gemm(te, tex, torch.randn(8, 16), torch.randn(4, 16))
    gemm(te, tex, a, b)
    assert len(outer.gemms) == 2
    assert inner.gemms == outer.gemms[1:]
    first, second = outer.gemms
    assert (first.a.format, first.b.format, first.a.scaling, first.out_dtype) == (
        "e4m3",
        "e5m2",
        "mxfp8",
        "bf16",
    )
    assert (first.a.usage, first.b.usage, first.layout) == ("rowwise", "rowwise", "TN")
    assert first.quantized
    assert (second.a.format, second.a.scaling, second.quantized) == ("fp32", "none", False)


def test_trace_records_options_of_quantizers(te, tex):
    with emulation.trace() as observed:
        tex.quantize(torch.randn(16, 16), tensorwise(te, force_pow_2_scales=True, amax_epsilon=0.25))
        tex.quantize(torch.randn(128, 128), blockwise(te, dim=2))
    tensor, block = observed.quantizations
    assert (tensor.quantizer, tensor.force_pow_2_scales, tensor.amax_epsilon) == (
        "Float8CurrentScalingQuantizer", True, 0.25)  # fmt: skip
    assert (block.block_scaling_dim, block.force_pow_2_scales, block.shape) == (2, True, (128, 128))


def test_blackwell_asks_for_the_innermost_dimension_that_it_reads(te, tex, blackwell):
    quantizer = tensorwise(te)
    a, b = tex.quantize(torch.randn(32, 24), quantizer), tex.quantize(torch.randn(16, 32), quantizer)
    with pytest.raises(RuntimeError, match="Leading dimension requirement on A for FP8 GEMM"):
        gemm(te, tex, a, b, "NN")


def test_hopper_asks_for_k_of_the_transposed_copy(te, tex, hopper):
    quantizer = tensorwise(te)
    a, b = torch.randn(32, 24), torch.randn(16, 32)
    out = gemm(te, tex, tex.quantize(a, quantizer), tex.quantize(b, quantizer), "NN")[0]
    expected = oracle.per_tensor(b, "e4m3").values @ oracle.per_tensor(a, "e4m3").values
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_epilogues_that_are_not_emulated(te, tex):
    a, dy = torch.randn(8, 16), torch.randn(4, 8)
    with pytest.raises(NotImplementedError, match="gradients of bias and GELU in one is not emulated"):
        gemm(te, tex, a, dy, "NN", grad=True, gelu=True, gelu_in=torch.randn(4, 16), bias=torch.empty(8))
    with pytest.raises(NotImplementedError, match="accumulates into a quantised output is not emulated"):
        gemm(te, tex, a.t(), dy, quantizer=tensorwise(te), accumulate=True)
    with pytest.raises(RuntimeError, match="GELU needs gelu_in"):
        gemm(te, tex, a, dy, "NN", grad=True, gelu=True)
