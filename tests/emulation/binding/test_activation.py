"""Activations and their gradients against torch and autograd, and what their quantised outputs cast."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.emulation.binding import oracle
from tests.emulation.binding.test_quantize import blockwise, delayed, mxfp8, tensorwise
from tests.support.te_release import since


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def gelu(x):
    return F.gelu(x, approximate="tanh")


UNARY = {"gelu": gelu, "qgelu": quick_gelu, "silu": F.silu, "relu": F.relu, "srelu": lambda x: F.relu(x) ** 2}
GATED = {
    "geglu": gelu,
    "qgeglu": quick_gelu,
    "swiglu": F.silu,
    "reglu": F.relu,
    "sreglu": UNARY["srelu"],
    "glu": torch.sigmoid,
}


def gated(function):
    def apply(x):
        gate, value = x.chunk(2, dim=-1)
        return function(gate) * value

    return apply


ALL = UNARY | {name: gated(function) for name, function in GATED.items()}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[since("2.14")] if name == "glu" else []) for name in ALL]
)
def test_forward_and_backward(tex, name):
    x = torch.randn(3, 8, 64, requires_grad=True)
    expected = ALL[name](x)
    dy = torch.randn_like(expected)
    expected.backward(dy)
    torch.testing.assert_close(getattr(tex, name)(x, None), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(getattr(tex, f"d{name}")(dy, x, None), x.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", UNARY)
def test_gradient_with_bias_gradient(te, tex, name):
    x = torch.randn(32, 64, requires_grad=True)
    dy = torch.randn(32, 64)
    UNARY[name](x).backward(dy)
    bias_grad, grad = getattr(tex, f"dbias_d{name}")(dy, x, None)
    torch.testing.assert_close(grad, x.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bias_grad, x.grad.sum(0), rtol=1e-4, atol=1e-4)
    _, quantized = getattr(tex, f"dbias_d{name}")(dy, x, mxfp8(te))
    assert torch.equal(quantized.dequantize(), tex.quantize(grad, mxfp8(te)).dequantize())


def test_clamped_swiglu(tex):
    x = (torch.randn(8, 64) * 6).requires_grad_()
    gate, value = x.chunk(2, dim=-1)
    gate, value = gate.clamp(max=7.0), value.clamp(-7.0, 7.0)
    expected = gate * torch.sigmoid(1.702 * gate) * (value + 1)
    dy = torch.randn_like(expected)
    expected.backward(dy)
    torch.testing.assert_close(tex.clamped_swiglu(x, None), expected.detach())
    torch.testing.assert_close(tex.clamped_dswiglu(dy, x, None), x.grad, rtol=1e-4, atol=1e-5)


def test_delayed_casts_the_fp32_result(te, tex, hopper):
    x = torch.randn(32, 64, dtype=torch.bfloat16)
    high = F.relu(x.float()) ** 2
    quantizer = delayed(te, scale=8.0)
    quantized = tex.srelu(x, quantizer)
    np.testing.assert_array_equal(quantized._data.numpy(), oracle.per_tensor(high, "e4m3", 8.0).codes)
    assert quantizer.amax.item() == high.max().item()
    assert quantized.dtype == torch.bfloat16


@pytest.mark.parametrize("maker", [mxfp8, blockwise])
def test_others_quantise_the_rounded_result(te, tex, maker):
    x = torch.randn(32, 64, dtype=torch.bfloat16)
    quantized = tex.srelu(x, maker(te))
    rounded = (F.relu(x.float()) ** 2).to(torch.bfloat16)
    assert torch.equal(quantized.dequantize(), tex.quantize(rounded, maker(te)).dequantize())
    assert tex.srelu(x, None).dtype == torch.bfloat16


# The squares of bf16 numbers are exact in fp32 and longer than bf16.
FUSED = {
    "srelu": lambda tex, x, dy, quantizer: tex.srelu(x, quantizer),
    "dsrelu": lambda tex, x, dy, quantizer: tex.dsrelu(dy, x, quantizer),
    "dbias_dsrelu": lambda tex, x, dy, quantizer: tex.dbias_dsrelu(dy, x, quantizer)[1],
    "sreglu": lambda tex, x, dy, quantizer: tex.sreglu(torch.cat((x, torch.ones_like(x)), -1), quantizer),
    "dsreglu": lambda tex, x, dy, quantizer: tex.dsreglu(
        dy, torch.cat((x, torch.ones_like(x)), -1), quantizer
    ),
}


def fused_result(name, x, dy):
    """fp32, as the kernel has it before it rounds."""
    positive = F.relu(x.float())
    if name in ("srelu", "sreglu"):
        return positive**2
    if name == "dsreglu":
        return torch.cat((2 * positive * dy.float(), positive**2 * dy.float()), -1)
    return 2 * positive * dy.float()


@pytest.mark.parametrize("name", FUSED)
def test_current_scaling_takes_the_amax_before_the_result_is_rounded(te, tex, name):
    """And the codes from the rounded result: `FUSED_ACTIVATION_AMAX_FP8`, whose kernel keeps both."""
    x, dy = torch.randn(2, 32, 64).bfloat16()
    exact = fused_result(name, x, dy)
    rounded = exact.bfloat16()
    assert exact.abs().max() != rounded.float().abs().max()
    quantized = FUSED[name](tex, x, dy, tensorwise(te))
    scale = np.float32(448.0) / np.float32(exact.abs().max())
    assert quantized._scale_inv.item() == np.float32(1) / scale
    np.testing.assert_array_equal(quantized._data.numpy(), oracle.per_tensor(rounded, "e4m3", scale).codes)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("hadamard", [False, True])
def test_nvfp4_takes_it_likewise_where_its_own_kernel_does_not(te, tex, blackwell, name, hadamard):
    from transformer_engine.pytorch.tensor.nvfp4_tensor import NVFP4Quantizer

    x, dy = torch.randn(2, 32, 64).bfloat16()
    exact = fused_result(name, x, dy)
    quantizer = NVFP4Quantizer(with_rht=hadamard, with_post_rht_amax=hadamard)
    quantized = FUSED[name](tex, x, dy, quantizer)
    largest = exact.bfloat16().float().abs().max() if hadamard else exact.abs().max()
    assert quantized._amax_rowwise.item() == largest.item()
    if not hadamard:
        assert quantized._amax_columnwise.item() == largest.item()


@pytest.mark.parametrize(
    ("maker", "rounds"), [(delayed, False), (mxfp8, False), (tensorwise, True), (blockwise, True)]
)
def test_the_bias_gradient_is_the_sum_of_what_the_kernel_has(te, tex, maker, rounds):
    """Of the fp32 result where one kernel does it all, of the tensor that it wrote otherwise."""
    x, dy = torch.randn(2, 32, 64).bfloat16()
    exact = fused_result("dbias_dsrelu", x, dy)
    summed = (exact.bfloat16().double() if rounds else exact.double()).sum(0)
    bias_grad, _ = tex.dbias_dsrelu(dy, x, maker(te))
    assert torch.equal(bias_grad, summed.bfloat16())


def test_clamps_drop_nan_as_fminf_and_fmaxf_do(tex):
    nan = torch.full((1, 32), float("nan"))
    ones = torch.ones(1, 32)
    gate = 7.0 * torch.sigmoid(torch.tensor(1.702 * 7.0))
    torch.testing.assert_close(
        tex.clamped_swiglu(torch.cat((nan, ones), -1), None), (2.0 * gate).expand(1, 32)
    )
    linear = torch.sigmoid(torch.tensor(1.702)) * -6.0
    torch.testing.assert_close(tex.clamped_swiglu(torch.cat((ones, nan), -1), None), linear.expand(1, 32))


def test_relu_drops_nan_as_fmaxf_does(tex):
    assert tex.relu(torch.tensor([float("nan"), -1.0, 2.0]), None).tolist() == [0.0, 0.0, 2.0]
