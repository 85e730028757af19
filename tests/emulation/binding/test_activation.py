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


@pytest.mark.parametrize("maker", [tensorwise, mxfp8, blockwise])
def test_others_quantise_the_rounded_result(te, tex, maker):
    x = torch.randn(32, 64, dtype=torch.bfloat16)
    quantized = tex.srelu(x, maker(te))
    rounded = (F.relu(x.float()) ** 2).to(torch.bfloat16)
    assert torch.equal(quantized.dequantize(), tex.quantize(rounded, maker(te)).dequantize())
    assert tex.srelu(x, None).dtype == torch.bfloat16


def test_relu_drops_nan_as_fmaxf_does(tex):
    assert tex.relu(torch.tensor([float("nan"), -1.0, 2.0]), None).tolist() == [0.0, 0.0, 2.0]
