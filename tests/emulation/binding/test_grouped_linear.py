"""Linear layers of experts that Transformer Engine runs on grouped tensors, forward and backward."""

from __future__ import annotations

import pytest
import torch

from nemo_fp8_recipes import emulation
from tests.support.te_release import since

TOKENS = [128, 0, 256, 128]
INPUTS, OUTPUTS = 256, 128
EXPERTS = len(TOKENS)

CASES = [
    pytest.param("blackwell", None, "bf16", id="bf16"),
    pytest.param("blackwell", "MXFP8BlockScaling", "mxfp8", id="mxfp8"),
    pytest.param("blackwell", "NVFP4BlockScaling", "nvfp4", id="nvfp4"),
    pytest.param("blackwell", "Float8CurrentScaling", "tensorwise", id="tensorwise", marks=since("2.20")),
    pytest.param("hopper", None, "bf16", id="bf16-hopper"),
    pytest.param("hopper", "Float8CurrentScaling", "tensorwise", id="tensorwise-hopper", marks=since("2.20")),
    pytest.param("hopper", "Float8BlockScaling", "blockwise", id="blockwise-hopper", marks=since("2.20")),
]
SCALINGS = {
    "bf16": {"none"},
    "mxfp8": {"mxfp8"},
    "nvfp4": {"nvfp4"},
    "tensorwise": {"tensorwise-or-delayed"},
    "blockwise": {"block_1d", "block_2d"},
}


def autocast(te, name):
    from transformer_engine.common import recipe

    made = None if name is None else getattr(recipe, name)()
    if name == "NVFP4BlockScaling":  # the same numbers twice
        made.disable_stochastic_rounding = True
    return te.fp8_autocast(enabled=made is not None, fp8_recipe=made)


def grouped_linear(te, monkeypatch, grouped, **options):
    """A module that runs on grouped tensors, or not: by an argument since 2.20, by the environment before."""
    torch.manual_seed(1)
    options = {"params_dtype": torch.bfloat16, **options}
    try:
        made = te.GroupedLinear(EXPERTS, INPUTS, OUTPUTS, use_grouped_tensor=grouped, **options)
    except TypeError:
        monkeypatch.setenv("NVTE_GROUPED_LINEAR_USE_FUSED_GROUPED_GEMM", str(int(grouped)))
        made = te.GroupedLinear(EXPERTS, INPUTS, OUTPUTS, **options)
    for name, parameter in made.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter)
    return made


def train(te, module, name, splits, x, dy):
    """Output "y", input gradient "dx", the parameters' gradients by their names; and what was multiplied."""
    x = x.clone().requires_grad_()
    with emulation.trace() as seen:
        with autocast(te, name):
            y = module(x, splits)
        y.backward(dy)
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **gradients}, seen.gemms


@since("2.17")
@pytest.mark.parametrize(("architecture", "name", "scaling"), CASES)
def test_the_module_computes_what_it_does_expert_by_expert(
    te, request, monkeypatch, architecture, name, scaling
):
    request.getfixturevalue(architecture)
    x = torch.randn(sum(TOKENS), INPUTS).bfloat16()
    dy = torch.randn(sum(TOKENS), OUTPUTS).bfloat16()
    found, gemms = train(
        te, grouped_linear(te, monkeypatch, True, bias=False), name, torch.tensor(TOKENS), x, dy
    )
    wanted, _ = train(te, grouped_linear(te, monkeypatch, False, bias=False), name, TOKENS, x, dy)
    assert found.keys() == wanted.keys()
    for key, expected in wanted.items():
        assert torch.equal(found[key], expected), key
    assert len(gemms) == 3 * sum(rows > 0 for rows in TOKENS)
    assert {operand.scaling for gemm in gemms for operand in (gemm.a, gemm.b)} <= SCALINGS[scaling]


@since("2.17")
@pytest.mark.parametrize(("architecture", "name", "scaling"), CASES)
def test_biases_of_the_module(te, request, monkeypatch, architecture, name, scaling):
    request.getfixturevalue(architecture)
    x = torch.randn(sum(TOKENS), INPUTS).bfloat16()
    dy = torch.randn(sum(TOKENS), OUTPUTS).bfloat16()
    module = grouped_linear(te, monkeypatch, True, bias=True)
    found, _ = train(te, module, name, torch.tensor(TOKENS), x, dy)
    plain = grouped_linear(te, monkeypatch, True, bias=False)
    product = train(te, plain, name, torch.tensor(TOKENS), x, dy)[0]["y"]
    biases = torch.stack([getattr(module, f"bias{number}").detach() for number in range(EXPERTS)])
    wanted = product.float() + biases.float().repeat_interleave(torch.tensor(TOKENS), dim=0)
    assert torch.equal(found["y"], wanted.bfloat16())
    for number, part in enumerate(dy.split(TOKENS)):
        gradient = getattr(module, f"bias{number}").grad
        torch.testing.assert_close(gradient, part.float().sum(0).bfloat16(), rtol=2**-7, atol=1e-3)


@since("2.20")
def test_numbers_of_tokens_have_to_be_on_the_device(te, blackwell, monkeypatch):
    module = grouped_linear(te, monkeypatch, True)
    x = torch.randn(sum(TOKENS), INPUTS).bfloat16()
    with pytest.raises(ValueError, match="requires CUDA m_splits"):
        module(x, TOKENS)
    splits = torch.tensor(TOKENS, dtype=torch.int32)
    assert module(x, splits).shape == (sum(TOKENS), OUTPUTS)
    assert module(x, m_splits=splits).shape == (sum(TOKENS), OUTPUTS)
    assert splits.device.type == "cpu"


@since("2.20")
@pytest.mark.parametrize(("architecture", "name", "scaling"), CASES)
def test_parameters_of_all_experts_in_one(te, request, monkeypatch, architecture, name, scaling):
    if scaling == "nvfp4":
        pytest.skip("Transformer Engine has no kernel for 16x16 blocks of several weights")
    request.getfixturevalue(architecture)
    monkeypatch.setenv("NVTE_GROUPED_LINEAR_SINGLE_PARAM", "1")
    x = torch.randn(sum(TOKENS), INPUTS).bfloat16()
    dy = torch.randn(sum(TOKENS), OUTPUTS).bfloat16()
    one = grouped_linear(te, monkeypatch, True, single_grouped_weight=True, single_grouped_bias=True)
    several = grouped_linear(te, monkeypatch, True)
    packed = one.weight.rowwise_data.view(EXPERTS, OUTPUTS, INPUTS)
    biases = one.bias.rowwise_data.view(EXPERTS, OUTPUTS)
    with torch.no_grad():
        for number in range(EXPERTS):
            getattr(several, f"weight{number}").copy_(packed[number])
            getattr(several, f"bias{number}").copy_(biases[number])
    found, _ = train(te, one, name, torch.tensor(TOKENS), x, dy)
    wanted, _ = train(te, several, name, torch.tensor(TOKENS), x, dy)
    assert torch.equal(found["y"], wanted["y"])
    assert torch.equal(found["dx"], wanted["dx"])
    for kind, shape in (("weight", (EXPERTS, OUTPUTS, INPUTS)), ("bias", (EXPERTS, OUTPUTS))):
        gradients = torch.stack([wanted[f"{kind}{number}"] for number in range(EXPERTS)])
        assert torch.equal(found[kind].view(shape), gradients)


@since("2.17")
@pytest.mark.parametrize("name", [None, "MXFP8BlockScaling"])
@pytest.mark.parametrize("fused", [False, True])
def test_the_operation_trains(te, blackwell, name, fused):
    """`te.ops.GroupedLinear`, with biases that are scaled by each token's probability, and gradients that are
    added to `main_grad`.
    """
    torch.manual_seed(2)
    options = {"dtype": torch.bfloat16, "scale_bias": True, "accumulate_into_main_grad": fused}
    operation = te.ops.GroupedLinear(EXPERTS, INPUTS, OUTPUTS, **options)
    for number in range(EXPERTS):
        torch.nn.init.normal_(getattr(operation, f"bias{number}"))
        getattr(operation, f"weight{number}").main_grad = torch.ones(OUTPUTS, INPUTS)
    x = torch.randn(sum(TOKENS), INPUTS).bfloat16().requires_grad_()
    probability = torch.rand(sum(TOKENS)).requires_grad_()
    dy = torch.randn(sum(TOKENS), OUTPUTS).bfloat16()
    with emulation.trace() as seen:
        with autocast(te, name):
            y = te.ops.Sequential(operation)(x, torch.tensor(TOKENS), probability)
        y.backward(dy)
    assert {gemm.layout for gemm in seen.gemms} == {"TN", "NN", "NT"}
    assert {gemm.a.scaling for gemm in seen.gemms} == {"mxfp8" if name else "none"}
    start = 0
    for number, rows in enumerate(TOKENS):
        weight, bias = (getattr(operation, f"{kind}{number}") for kind in ("weight", "bias"))
        part = slice(start, start + rows)
        own, factor, gradient = x[part].double(), probability[part].double(), dy[part].double()
        close = {"rtol": 0.1, "atol": 1.5 if name else 0.2}  # as exact as 8 bits are
        torch.testing.assert_close(
            y[part].double(), own @ weight.double().t() + factor[:, None] * bias.double(), **close
        )
        torch.testing.assert_close(x.grad[part].double(), gradient @ weight.double(), **close)
        dw = weight.main_grad - 1.0 if fused else weight.grad
        torch.testing.assert_close(dw.double(), gradient.t() @ own, rtol=0.1, atol=5.0 if name else 0.2)
        dbias = (gradient * factor[:, None]).sum(dim=0)
        torch.testing.assert_close(bias.grad.double(), dbias, **close)
        torch.testing.assert_close(
            probability.grad[part].double(), gradient @ bias.double(), rtol=1e-2, atol=0.2
        )
        start += rows


@since("2.17")
def test_sums_of_biases_are_not_deterministic_on_a_gpu(te, blackwell, monkeypatch):
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    from transformer_engine.pytorch.triton.grouped_dbias_dscales import compute_grouped_dbias

    with pytest.raises(RuntimeError, match="non-deterministic atomic adds"):
        compute_grouped_dbias(torch.ones(4, 8), torch.tensor([0, 4]), 1)
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")
    before = torch.full((2, 8), 10.0)
    dy = torch.arange(32.0).view(4, 8)
    after = compute_grouped_dbias(dy, torch.tensor([0, 1, 4]), 2, before)
    assert after is before
    assert torch.equal(after, 10.0 + torch.stack((dy[0], dy[1:].sum(0))))
