"""te.Linear and te.LayerNormLinear, forward and backward, from operands quantised by `oracle`.

TE's modules run as they are; what is checked is that every recipe multiplies the operands it should, in the
formats it should, and adds nothing: outputs and gradients equal a float64 computation on the oracle's values.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nemo_fp8_recipes import emulation
from nemo_fp8_recipes.emulation.trace import GemmRecord
from tests.emulation.binding import oracle

DTYPES = [torch.float32, torch.bfloat16]
TOKENS, INPUTS, OUTPUTS = 160, 192, 96


def recipe(name, fmt):
    from transformer_engine.common.recipe import (
        DelayedScaling,
        Float8BlockScaling,
        Float8CurrentScaling,
        Format,
        MXFP8BlockScaling,
    )

    kinds = {
        "delayed": DelayedScaling,
        "tensorwise": Float8CurrentScaling,
        "mxfp8": MXFP8BlockScaling,
        "blockwise": Float8BlockScaling,
    }
    return kinds[name](fp8_format=getattr(Format, fmt.upper()))


CASES = [
    ("delayed", "hybrid"),
    ("delayed", "e4m3"),
    ("tensorwise", "hybrid"),
    ("tensorwise", "e4m3"),
    ("mxfp8", "e4m3"),
    ("mxfp8", "hybrid"),
    ("blockwise", "e4m3"),
    ("blockwise", "hybrid"),
]


def oracle_pair(name, x, fmt, *, weight=False):
    """Values of a matrix as a GEMM reads them along rows, and along columns."""
    if name == "delayed":  # a first step: every scale is still 1
        both = oracle.per_tensor(x, fmt, 1.0).values
        return both, both
    if name == "tensorwise":
        both = oracle.per_tensor(x, fmt).values
        return both, both
    if name == "mxfp8":
        return oracle.mx(x, fmt).values, oracle.mx(x, fmt, columnwise=True).values
    if weight:
        both = oracle.blocks(x, fmt, (128, 128)).values
        return both, both
    return oracle.blocks(x, fmt, (1, 128)).values, oracle.blocks(x, fmt, (128, 1)).values


def product(a, b):
    return a.astype(np.float64) @ b.astype(np.float64)


def close(found: torch.Tensor, expected: np.ndarray):
    """Within the rounding of the output's dtype (and of an fp32 sum)."""
    epsilon = 2.0**-8 if found.dtype == torch.bfloat16 else 2.0**-20
    scale = np.abs(expected).max()
    error = np.abs(oracle.array(found).astype(np.float64).reshape(expected.shape) - expected)
    assert (error <= epsilon * np.abs(expected) + 2.0**-20 * scale).all(), error.max() / scale


def bias_values(module) -> np.ndarray:
    """cuBLAS takes no fp32 bias in an FP8 GEMM: TE rounds it to bf16."""
    return oracle.array(module.bias.to(torch.bfloat16))


def run(module, x, dy, te, with_recipe):
    with emulation.trace() as observed, te.autocast(enabled=True, recipe=with_recipe):
        y = module(x)
    with emulation.trace() as backward:
        y.backward(dy)
    return y, observed.gemms + backward.gemms, observed.quantizations + backward.quantizations


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "fmt"), CASES)
def test_linear(te, tex, name, fmt, dtype, bias):
    module = te.Linear(INPUTS, OUTPUTS, bias=bias, params_dtype=dtype, device="cuda")
    x = torch.randn(TOKENS, INPUTS, dtype=dtype).requires_grad_()
    dy = torch.randn(TOKENS, OUTPUTS, dtype=dtype) * 0.01
    if bias:
        torch.nn.init.normal_(module.bias)
    y, gemms, _ = run(module, x, dy, te, recipe(name, fmt))

    grad_fmt = "e5m2" if fmt == "hybrid" else "e4m3"
    x_rows, x_columns = oracle_pair(name, x, "e4m3")
    w_rows, w_columns = oracle_pair(name, module.weight, "e4m3", weight=True)
    dy_rows, dy_columns = oracle_pair(name, dy, grad_fmt)
    expected = product(x_rows, w_rows.T)
    if bias:
        expected = expected + bias_values(module)
        close(module.bias.grad, oracle.array(dy).astype(np.float64).sum(0))
    close(y, expected)
    close(x.grad, product(dy_rows, w_columns))
    close(module.weight.grad, product(dy_columns.T, x_columns))
    assert y.dtype == x.grad.dtype == module.weight.grad.dtype == dtype
    check_gemms(gemms, name, grad_fmt)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("name", ["delayed", "tensorwise", "mxfp8", "blockwise"])
def test_layernorm_linear(te, tex, name, normalization, dtype, bias):
    module = te.LayerNormLinear(
        INPUTS,
        OUTPUTS,
        bias=bias,
        normalization=normalization,
        params_dtype=dtype,
        device="cuda",
    )
    with torch.no_grad():
        module.layer_norm_weight.copy_(torch.rand(INPUTS) + 0.5)
    fmt = "e4m3" if name in ("mxfp8", "blockwise") else "hybrid"
    x = torch.randn(TOKENS, INPUTS, dtype=dtype).requires_grad_()
    dy = torch.randn(TOKENS, OUTPUTS, dtype=dtype) * 0.01

    y, gemms, quantizations = run(module, x, dy, te, recipe(name, fmt))

    fp32 = x.detach().float()
    shape = (INPUTS,)
    if normalization == "LayerNorm":
        normed = torch.nn.functional.layer_norm(
            fp32, shape, module.layer_norm_weight.float(), module.layer_norm_bias.float(), module.eps
        )
    else:
        normed = torch.nn.functional.rms_norm(fp32, shape, module.layer_norm_weight.float(), module.eps)
    # Only the kernel of delayed scaling casts the fp32 norm; the others round it to the output dtype first.
    x_rows, x_columns = oracle_pair(name, normed if name == "delayed" else normed.to(dtype), "e4m3")
    w_rows, w_columns = oracle_pair(name, module.weight, "e4m3", weight=True)
    grad_fmt = "e5m2" if fmt == "hybrid" else "e4m3"
    dy_rows, dy_columns = oracle_pair(name, dy, grad_fmt)
    expected = product(x_rows, w_rows.T)
    if bias:
        expected = expected + bias_values(module)
    # One code more or less where the two computations of the norm differ by an fp32 rounding.
    error = np.abs(oracle.array(y) - expected)
    assert np.quantile(error, 0.95) <= 2.0**-8 * np.abs(expected).max()
    error = np.abs(oracle.array(module.weight.grad) - product(dy_columns.T, x_columns))
    assert error.max() <= 2.0**-6 * np.abs(oracle.array(module.weight.grad)).max()

    d_normed = torch.from_numpy(product(dy_rows, w_columns)).float().to(dtype).float()
    reference = x.detach().float().requires_grad_()
    if normalization == "LayerNorm":
        again = torch.nn.functional.layer_norm(
            reference, shape, module.layer_norm_weight.float(), eps=module.eps
        )
    else:
        again = torch.nn.functional.rms_norm(reference, shape, module.layer_norm_weight.float(), module.eps)
    again.backward(d_normed)
    torch.testing.assert_close(x.grad.float(), reference.grad, rtol=2.0**-6, atol=2.0**-9)
    check_gemms(gemms, name, grad_fmt)
    fused = {"LayerNorm": "layernorm_fwd", "RMSNorm": "rmsnorm_fwd"}[normalization]
    assert [record.source for record in quantizations].count(fused) == 1


def check_gemms(gemms: list[GemmRecord], name: str, grad_fmt: str) -> None:
    assert [gemm.layout for gemm in gemms] == ["TN", "NN", "NT"]
    forward, dgrad, wgrad = gemms
    assert all(gemm.quantized for gemm in gemms)
    assert (forward.a.format, forward.b.format) == ("e4m3", "e4m3")
    assert (dgrad.a.format, dgrad.b.format) == ("e4m3", grad_fmt)
    assert (wgrad.a.format, wgrad.b.format) == ("e4m3", grad_fmt)
    weight, activation = {
        "delayed": ("tensorwise-or-delayed", "tensorwise-or-delayed"),
        "tensorwise": ("tensorwise-or-delayed", "tensorwise-or-delayed"),
        "mxfp8": ("mxfp8", "mxfp8"),
        "blockwise": ("block_2d", "block_1d"),
    }[name]
    assert forward.a.scaling == dgrad.a.scaling == weight
    assert forward.b.scaling == dgrad.b.scaling == wgrad.a.scaling == wgrad.b.scaling == activation
    assert (forward.m, forward.n, forward.k) == (OUTPUTS, TOKENS, INPUTS)
    assert (dgrad.m, dgrad.n, dgrad.k) == (INPUTS, TOKENS, OUTPUTS)
    assert (wgrad.m, wgrad.n, wgrad.k) == (INPUTS, OUTPUTS, TOKENS)


@pytest.mark.parametrize("architecture", ["hopper", "blackwell"])
@pytest.mark.parametrize("name", ["delayed", "tensorwise", "blockwise"])
def test_both_architectures_compute_the_same(te, tex, name, architecture, request):
    """What differs between them is where codes are kept, never what is computed."""
    request.getfixturevalue(architecture)
    torch.manual_seed(3)
    module = te.Linear(INPUTS, OUTPUTS, params_dtype=torch.bfloat16, device="cuda")
    x = torch.randn(TOKENS, INPUTS, dtype=torch.bfloat16).requires_grad_()
    dy = torch.randn(TOKENS, OUTPUTS, dtype=torch.bfloat16)
    fmt = "e4m3" if name == "blockwise" else "hybrid"
    y, _, _ = run(module, x, dy, te, recipe(name, fmt))
    digest = (y.sum().item(), x.grad.double().sum().item(), module.weight.grad.double().sum().item())
    key = f"architecture/{name}"
    first = _RESULTS.setdefault(key, digest)
    assert digest == first


_RESULTS: dict[str, tuple[float, ...]] = {}


def test_delayed_uses_the_scale_of_the_step_before(te, tex):
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    FP8GlobalStateManager.reset()
    module = te.Linear(64, 64, bias=False, params_dtype=torch.float32, device="cuda")
    with_recipe = recipe("delayed", "hybrid")
    amaxes = []
    for step in range(3):
        x = torch.randn(32, 64) * (step + 1)
        amaxes.append(x.abs().max().item())
        with te.autocast(enabled=True, recipe=with_recipe):
            y = module(x)
        y.sum().backward()
        history = module.fp8_meta["scaling_fwd"].amax_history
        scale = module.fp8_meta["scaling_fwd"].scale
        assert history[-1, 0].item() == amaxes[-1]
        assert scale[0].item() == np.float32(448.0) / np.float32(max(amaxes))
        weight = module.fp8_meta["scaling_fwd"].scale[1].item()
        assert weight == np.float32(448.0) / np.float32(module.weight.abs().max().item())


def test_without_autocast_nothing_is_quantised(te, tex):
    module = te.Linear(64, 64, params_dtype=torch.bfloat16, device="cuda")
    x = torch.randn(32, 64, dtype=torch.bfloat16).requires_grad_()
    with emulation.trace() as observed:
        module(x).sum().backward()
    assert [gemm.quantized for gemm in observed.gemms] == [False] * 3
    assert observed.quantizations == []
    torch.testing.assert_close(
        x.grad, (torch.ones(32, 64, dtype=torch.bfloat16) @ module.weight).detach(), rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("name", ["delayed", "tensorwise", "mxfp8", "blockwise"])
def test_layernorm_mlp_runs_every_gemm_in_fp8(te, tex, name):
    module = te.LayerNormMLP(
        64, 128, activation="srelu", params_dtype=torch.bfloat16, bias=False, device="cuda"
    )
    x = torch.randn(64, 64, dtype=torch.bfloat16).requires_grad_()
    fmt = "e4m3" if name in ("mxfp8", "blockwise") else "hybrid"
    with emulation.trace() as observed:
        with te.autocast(enabled=True, recipe=recipe(name, fmt)):
            y = module(x)
        y.float().square().sum().backward()
    quantised, exact = y.detach(), module(x).detach()
    assert [gemm.quantized for gemm in observed.gemms] == [True] * 6
    error = (quantised - exact).norm() / exact.norm()
    assert 0.005 < error < 0.1


def test_dimensions_that_the_gemm_refuses(te, tex, hopper):
    with (
        te.autocast(enabled=True, recipe=recipe("tensorwise", "hybrid")),
        pytest.raises(
            (AssertionError, RuntimeError, ValueError), match=r"divisible|Leading dimension requirement"
        ),
    ):
        te.Linear(64, 24, params_dtype=torch.bfloat16, device="cuda")(
            torch.randn(16, 64, dtype=torch.bfloat16).requires_grad_()
        ).sum().backward()
