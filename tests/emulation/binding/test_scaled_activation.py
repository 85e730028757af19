"""Activations with a factor a row, SiTU-GLU and dropout against torch and autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.emulation.binding.test_quantize import delayed, mxfp8, tensorwise
from tests.support.te_release import since


def situ(first, second, beta1=4.0, beta2=25.0):
    return beta1 * torch.tanh(first / beta1) * torch.sigmoid(first) * beta2 * torch.tanh(second / beta2)


def clamped(first, second, limit=7.0, alpha=1.702, offset=1.0):
    first = first.clamp(max=limit)
    return first * torch.sigmoid(alpha * first) * (second.clamp(-limit, limit) + offset)


GATED = {
    "swiglu": (lambda first, second: F.silu(first) * second, {}),
    "situglu": (situ, {"beta1": 2.0, "beta2": 3.0}),
    "clamped_swiglu": (clamped, {"limit": 2.0, "alpha": 1.3, "glu_linear_offset": 0.5}),
}
TORCH_NAMES = {"glu_linear_offset": "offset"}


def split(x, turn):
    """Halves of a gated input whose halves come in turns of so many columns."""
    if not turn:
        return x.chunk(2, dim=-1)
    groups = x.unflatten(-1, (-1, turn))
    return groups[..., 0::2, :].flatten(-2), groups[..., 1::2, :].flatten(-2)


def name_of(activation, gradient):
    return (
        {
            "swiglu": "dswiglu",
            "situglu": "dsituglu",
            "clamped_swiglu": "clamped_dswiglu",
            "srelu": "dsrelu",
        }[activation]
        if gradient
        else activation
    )


@since("2.20")
@pytest.mark.parametrize("turn", [0, 32])
@pytest.mark.parametrize("activation", GATED)
def test_gated_forward_and_backward(tex, activation, turn):
    function, options = GATED[activation]
    x = (torch.randn(3, 5, 256) * 3).requires_grad_()
    scales = torch.rand(3, 5).requires_grad_()
    expected = function(*split(x, turn), **{TORCH_NAMES.get(k, k): v for k, v in options.items()})
    expected = expected * scales[..., None]
    dy = torch.randn_like(expected)
    expected.backward(dy)
    options = {**options, "glu_interleave_size": turn}
    out = getattr(tex, f"scaled_{activation}")(x, scales, None, **options)
    torch.testing.assert_close(out, expected.detach(), rtol=1e-5, atol=1e-6)
    backward = getattr(tex, f"scaled_{name_of(activation, gradient=True)}")
    dx, d_scales = backward(dy, x, scales, None, **options)
    torch.testing.assert_close(dx, x.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(d_scales, scales.grad, rtol=1e-4, atol=1e-4)
    assert backward(dy, x, scales, None, compute_scale_grad=False, **options)[1] is None


@since("2.20")
def test_squared_relu(tex):
    x = torch.randn(8, 64, requires_grad=True)
    scales = torch.rand(8, requires_grad=True)
    expected = F.relu(x).square() * scales[:, None]
    dy = torch.randn_like(expected)
    expected.backward(dy)
    torch.testing.assert_close(tex.scaled_srelu(x, scales, None), expected.detach())
    dx, d_scales = tex.scaled_dsrelu(dy, x, scales, None)
    torch.testing.assert_close(dx, x.grad)
    torch.testing.assert_close(d_scales, scales.grad)


@since("2.20")
@pytest.mark.parametrize("maker", [delayed, tensorwise, mxfp8])
def test_a_scaled_result_is_rounded_before_it_is_quantised(te, tex, maker):
    """Unlike the unscaled activations, delayed scaling too casts what the kernel has stored."""
    x, scales = torch.randn(32, 128).bfloat16(), torch.rand(32)
    high = tex.scaled_swiglu(x, scales, None)
    assert high.dtype == torch.bfloat16
    quantized = tex.scaled_swiglu(x, scales, maker(te))
    assert torch.equal(quantized.dequantize(), tex.quantize(high, maker(te)).dequantize())


@since("2.20")
def test_what_the_kernels_refuse(tex):
    x, scales = torch.randn(4, 128), torch.rand(4)
    with pytest.raises(RuntimeError, match="one scale per input row"):
        tex.scaled_swiglu(x, scales[:3], None)
    with pytest.raises(RuntimeError, match="must be a multiple of 32"):
        tex.scaled_swiglu(x, scales, None, 16)
    with pytest.raises(RuntimeError, match="divisible by glu_interleave_size"):
        tex.scaled_swiglu(torch.randn(4, 96), scales, None, 32)
    with pytest.raises(RuntimeError, match="beta1 must be finite and positive"):
        tex.scaled_situglu(x, scales, None, beta1=0.0)


@since("2.20")
def test_situglu(te, tex):
    x = (torch.randn(32, 128) * 4).requires_grad_()
    expected = situ(*x.chunk(2, dim=-1), beta1=2.0, beta2=3.0)
    dy = torch.randn_like(expected)
    expected.backward(dy)
    torch.testing.assert_close(tex.situglu(x, None, 2.0, 3.0), expected.detach())
    torch.testing.assert_close(tex.dsituglu(dy, x, None, 2.0, 3.0), x.grad, rtol=1e-4, atol=1e-5)
    low = x.detach().bfloat16()
    quantized = tex.situglu(low, mxfp8(te))
    assert torch.equal(quantized.dequantize(), tex.quantize(tex.situglu(low, None), mxfp8(te)).dequantize())


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5])
def test_dropout(tex, probability):
    torch.manual_seed(1)
    x = torch.randn(64, 256).bfloat16()
    out, mask = tex.dropout_fwd(x, probability)
    kept = torch.from_numpy(np.unpackbits(mask.numpy(), bitorder="little").astype(bool)).view(x.shape)
    factor = np.float32(1) / (np.float32(1) - np.float32(probability))
    assert torch.equal(out, torch.where(kept, x.float() * float(factor), 0.0).bfloat16())
    # A byte of random bits decides: the probability is rounded down to a multiple of 1/256.
    rounded = int(probability * 256) / 256
    assert kept.float().mean().item() == pytest.approx(1 - rounded, abs=0.02)
    dy = torch.randn_like(x)
    assert torch.equal(
        tex.dropout_bwd(dy, mask, probability), torch.where(kept, dy.float() * float(factor), 0.0).bfloat16()
    )


def test_dropout_reads_fp8_and_refuses_what_the_kernel_refuses(te, tex):
    quantized = tex.quantize(torch.randn(16, 64).bfloat16(), delayed(te, scale=8.0))
    out, _ = tex.dropout_fwd(quantized, 0.0)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, quantized.dequantize().bfloat16())
    with pytest.raises(RuntimeError, match=r"must be FP16/BF16 tensor, but dtype is Float32\."):
        tex.dropout_fwd(torch.randn(16, 64), 0.1)
    with pytest.raises(RuntimeError, match="FP8 tensor, but scaling mode is NVTE_MXFP8_1D_SCALING"):
        tex.dropout_fwd(tex.quantize(torch.randn(32, 64).bfloat16(), mxfp8(te)), 0.1)
    with pytest.raises(RuntimeError, match=r"must have 1024 bits, but found dtype=Byte and shape="):
        tex.dropout_bwd(torch.randn(16, 64).bfloat16(), torch.zeros(5, dtype=torch.uint8), 0.1)
    half, single = torch.randn(16).half(), torch.randn(16)
    for x, out in ((half, half.bfloat16()), (single, half)):
        with pytest.raises(RuntimeError, match=r"Input tensor .*dtype"):
            tex.dropout_fwd(x, 0.1, out)
    mask = torch.zeros(2, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"Grad output tensor \(dtype=.*do not match"):
        tex.dropout_bwd(half, mask, 0.1, half.bfloat16())
    with pytest.raises(RuntimeError, match="Grad output tensor must be FP16/BF16"):
        tex.dropout_bwd(single, mask, 0.1)
    with pytest.raises(RuntimeError, match="divisible by 16"):
        tex.dropout_fwd(torch.randn(3, 5).bfloat16(), 0.1)
    for probability in (1.0, 1.0 - 2.0**-30):  # as an fp32 argument this is 1
        with pytest.raises(RuntimeError, match="Invalid dropout probability"):
            tex.dropout_fwd(torch.randn(16).bfloat16(), probability)


def test_dropouts_probability_is_an_fp32_number(tex):
    """Just below a multiple of 1/256 in double precision, and that multiple in the kernel's."""
    torch.manual_seed(3)
    _, above = tex.dropout_fwd(torch.ones(4096).bfloat16(), 0.5)
    torch.manual_seed(3)
    _, below = tex.dropout_fwd(torch.ones(4096).bfloat16(), 0.5 - 2.0**-40)
    assert torch.equal(above, below)
