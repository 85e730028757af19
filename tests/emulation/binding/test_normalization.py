"""LayerNorm and RMSNorm against torch's own, forward and backward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import layer_norm, rms_norm

from tests.emulation.binding import oracle
from tests.emulation.binding.test_quantize import blockwise, delayed, mxfp8, tensorwise

ROWS, HIDDEN, EPS = 64, 96, 1e-5


def inputs(dtype):
    x = (torch.randn(2, ROWS // 2, HIDDEN) * 3 + 1).to(dtype)
    return x, torch.randn(HIDDEN).to(dtype), torch.randn(HIDDEN).to(dtype), torch.randn_like(x)


def tag(te, dtype):
    return te.DType.kBFloat16 if dtype == torch.bfloat16 else te.DType.kFloat32


def tolerances(dtype):
    return {"rtol": 2**-7, "atol": 2**-6} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layernorm(te, tex, dtype, zero_centered):
    x, gamma, beta, dz = inputs(dtype)
    leaves = [t.float().requires_grad_() for t in (x, gamma, beta)]
    expected = layer_norm(leaves[0], (HIDDEN,), leaves[1] + float(zero_centered), leaves[2], EPS)
    expected.backward(dz.float())
    y, mu, rsigma = tex.layernorm_fwd(x, gamma, beta, EPS, None, None, tag(te, dtype), 0, zero_centered)
    grads = tex.layernorm_bwd(dz, x, mu, rsigma, gamma, 0, zero_centered)
    assert y.dtype == dtype
    assert y.shape == x.shape
    assert mu.shape == rsigma.shape == (ROWS,)
    torch.testing.assert_close(y.float(), expected.detach(), **tolerances(dtype))
    for found, leaf in zip(grads, leaves, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), leaf.grad, **tolerances(dtype))


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rmsnorm(te, tex, dtype, zero_centered):
    x, gamma, _, dz = inputs(dtype)
    leaves = [t.float().requires_grad_() for t in (x, gamma)]
    expected = rms_norm(leaves[0], (HIDDEN,), leaves[1] + float(zero_centered), EPS)
    expected.backward(dz.float())
    y, nothing, rsigma = tex.rmsnorm_fwd(x, gamma, EPS, None, None, tag(te, dtype), 0, zero_centered)
    assert nothing is None
    torch.testing.assert_close(y.float(), expected.detach(), **tolerances(dtype))
    for found, leaf in zip(tex.rmsnorm_bwd(dz, x, rsigma, gamma, 0, zero_centered), leaves, strict=True):
        torch.testing.assert_close(found.float(), leaf.grad, **tolerances(dtype))


def test_rmsnorm_backward_with_residual_rounds_once(te, tex):
    x, gamma, _, dz = inputs(torch.bfloat16)
    residual = torch.randn_like(x)
    _, _, rsigma = tex.rmsnorm_fwd(x, gamma, EPS, None, None, te.DType.kBFloat16, 0, False)
    fused, dgamma = tex.rmsnorm_bwd_add(dz, x, residual, rsigma, gamma, 0, False)
    exact, _ = tex.rmsnorm_bwd(dz, x.float(), rsigma, gamma, 0, False)
    assert torch.equal(fused, (exact + residual.float()).to(torch.bfloat16))
    assert dgamma.dtype == torch.bfloat16


def test_delayed_casts_the_fp32_norm(te, tex, hopper):
    """Its kernel writes FP8 directly: rounding to bf16 on the way would change codes and amax."""
    x, gamma, beta, _ = inputs(torch.bfloat16)
    high = tex.layernorm_fwd(x, gamma, beta, EPS, None, None, te.DType.kFloat32, 0, False)[0]
    quantizer = delayed(te, scale=16.0)
    y = tex.layernorm_fwd(x, gamma, beta, EPS, None, quantizer, te.DType.kBFloat16, 0, False)[0]
    directly = oracle.per_tensor(high, "e4m3", 16.0).codes
    rounded = oracle.per_tensor(high.to(torch.bfloat16), "e4m3", 16.0).codes
    assert (directly != rounded).any()
    np.testing.assert_array_equal(y._data.numpy(), directly)
    assert quantizer.amax.item() == high.abs().max().item() != high.to(torch.bfloat16).abs().max().item()
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("maker", [tensorwise, mxfp8, blockwise])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_others_quantise_the_rounded_norm(te, tex, maker, norm):
    x, gamma, beta, _ = inputs(torch.bfloat16)
    arguments = (x, gamma, beta, EPS) if norm == "layernorm" else (x, gamma, EPS)
    forward = getattr(tex, f"{norm}_fwd")
    plain = forward(*arguments, None, None, te.DType.kBFloat16, 0, False)[0]
    quantized = forward(*arguments, None, maker(te), te.DType.kBFloat16, 0, False)[0]
    assert torch.equal(quantized.dequantize(), tex.quantize(plain, maker(te)).dequantize())


def test_output_buffers_are_written_in_place(te, tex):
    x, gamma, beta, _ = inputs(torch.float32)
    out = torch.empty_like(x)
    y = tex.layernorm_fwd(x, gamma, beta, EPS, out, None, te.DType.kFloat32, 0, False)[0]
    assert y is out
    tensor = tex.quantize(torch.zeros_like(x), tensorwise(te))
    pointer = tensor._data.data_ptr()
    z = tex.layernorm_fwd(x, gamma, beta, EPS, tensor, tensorwise(te), te.DType.kFloat32, 0, False)[0]
    assert z is tensor
    assert tensor._data.data_ptr() == pointer
    np.testing.assert_array_equal(tensor._data.numpy(), oracle.per_tensor(y, "e4m3").codes)
