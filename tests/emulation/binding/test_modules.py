"""TE's larger modules, against its Linear and against themselves: whatever they fuse, save or recompute, the
numbers are those of the plain way.
"""

from __future__ import annotations

import pytest
import torch

from nemo_fp8_recipes import emulation
from tests.support.te_release import SAVED_INPUT_REFUSAL

BF16 = torch.bfloat16
RECIPES = ("delayed", "tensorwise", "mxfp8", "blockwise", "nvfp4")

pytestmark = pytest.mark.usefixtures("blackwell")


def recipe(name):
    from transformer_engine.common import recipe as recipes

    if name == "nvfp4":  # nothing random, so that two computations are comparable
        return recipes.NVFP4BlockScaling(disable_stochastic_rounding=True)
    kind = {
        "delayed": "DelayedScaling",
        "tensorwise": "Float8CurrentScaling",
        "mxfp8": "MXFP8BlockScaling",
        "blockwise": "Float8BlockScaling",
    }[name]
    return getattr(recipes, kind)()


def step(te, module, x, dy, with_recipe, *arguments):
    """Output, gradients and what was computed in one forward and backward pass."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad(set_to_none=True)
    with emulation.trace() as observed:
        with te.autocast(enabled=with_recipe is not None, recipe=with_recipe):
            y = module(x, *arguments)
        y.backward(dy)
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return y.detach(), x.grad, grads, observed


def equal(found, expected):
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert found[2].keys() == expected[2].keys()
    for name, grad in expected[2].items():
        assert torch.equal(found[2][name], grad), name


class Separate(torch.nn.Module):
    """What GroupedLinear stands for: one Linear for each group of rows."""

    def __init__(self, te, grouped, experts, inputs, outputs, device="cuda"):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            te.Linear(inputs, outputs, params_dtype=BF16, device=device) for _ in range(experts)
        )
        with torch.no_grad():
            for number, layer in enumerate(self.layers):
                layer.weight.copy_(getattr(grouped, f"weight{number}"))
                layer.bias.copy_(getattr(grouped, f"bias{number}"))


def grouped_against_separate(te, splits, with_recipe):
    torch.manual_seed(5)
    experts, inputs, outputs = len(splits), 64, 96
    grouped = te.GroupedLinear(experts, inputs, outputs, params_dtype=BF16, device="cuda")
    separate = Separate(te, grouped, experts, inputs, outputs)
    x, dy = torch.randn(sum(splits), inputs).to(BF16), torch.randn(sum(splits), outputs).to(BF16)
    y, dx, grads, observed = step(te, grouped, x, dy, with_recipe, splits)
    # In a first step delayed scaling's scale is 1 for all, so that its groups compare too.
    offset = 0
    for number, (layer, rows) in enumerate(zip(separate.layers, splits, strict=True)):
        part = slice(offset, offset + rows)
        offset += rows
        if rows == 0:
            assert not grads[f"weight{number}"].any()
            assert not grads[f"bias{number}"].any()
            continue
        found = step(te, layer, x[part], dy[part], with_recipe)
        torch.testing.assert_close(y[part], found[0], rtol=0, atol=0)
        torch.testing.assert_close(dx[part], found[1], rtol=0, atol=0)
        torch.testing.assert_close(grads[f"weight{number}"], found[2]["weight"], rtol=0, atol=0)
        torch.testing.assert_close(grads[f"bias{number}"], found[2]["bias"], rtol=2**-7, atol=2**-5)
    return observed


@pytest.mark.parametrize("splits", [[32, 0, 96, 64], [0, 0, 128, 0], [128, 64]], ids=str)
@pytest.mark.parametrize("name", RECIPES)
def test_grouped_linear_is_one_linear_for_each_group(te, tex, name, splits):
    observed = grouped_against_separate(te, splits, recipe(name))
    busy = sum(rows > 0 for rows in splits)
    assert [gemm.quantized for gemm in observed.gemms] == [True] * (3 * busy)


@pytest.mark.parametrize("splits", [[7, 0, 25, 1], [33, 31], [0, 0]], ids=str)
def test_grouped_linear_in_high_precision_takes_any_number_of_tokens(te, tex, splits):
    observed = grouped_against_separate(te, splits, None)
    assert not any(gemm.quantized for gemm in observed.gemms)


REFUSED = {
    "mxfp8": "MXFP8 requires tensor dims that are divisible by 32",
    "nvfp4": "must be divisible by 16",
    "tensorwise": "Leading dimension requirement on .* for FP8 GEMM. Caller must pad.",
}


@pytest.mark.parametrize("name", REFUSED)
def test_unaligned_groups_are_refused_as_by_te(te, tex, request, name):
    module = te.GroupedLinear(2, 64, 96, params_dtype=BF16, device="cuda")
    if name == "tensorwise":
        request.getfixturevalue("hopper")  # Blackwell reads any layout
    with pytest.raises(
        (RuntimeError, ValueError, AssertionError), match=f"{REFUSED[name]}|divisible by|multiple of"
    ):
        step(te, module, torch.randn(32, 64).to(BF16), torch.randn(32, 96).to(BF16), recipe(name), [25, 7])


@pytest.mark.parametrize(
    ("name", "align"), [("tensorwise", 16), ("mxfp8", 32), ("blockwise", 16), ("nvfp4", 64)]
)
def test_padded_groups_compute_what_their_rows_do(te, tex, name, align):
    splits = [25, 0, 7, 33]
    module = te.GroupedLinear(4, 64, 96, bias=False, params_dtype=BF16, device="cuda")
    x = torch.randn(sum(splits), 64).to(BF16)
    pad, unpad = te.Fp8Padding(4, align), te.Fp8Unpadding(4, align)
    with te.autocast(enabled=True, recipe=recipe(name)):
        padded, rows = pad(x, splits)
        y = unpad(module(padded, rows), splits)
    assert rows == [-(-each // align) * align for each in splits]
    assert y.shape == (65, 96)
    offset = 0
    for number, each in enumerate(splits):
        part = slice(offset, offset + each)
        offset += each
        exact = x[part].float() @ getattr(module, f"weight{number}").detach().float().t()
        limit = 0.25 if name == "nvfp4" else 0.08
        assert (y[part].float() - exact).norm() <= limit * exact.norm()


ACTIVATIONS = ("gelu", "geglu", "qgelu", "qgeglu", "relu", "reglu", "srelu", "sreglu", "silu", "swiglu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layernorm_mlp_with_every_activation(te, tex, activation):
    module = te.LayerNormMLP(64, 128, activation=activation, params_dtype=BF16, device="cuda")
    x, dy = torch.randn(64, 64).to(BF16), torch.randn(64, 64).to(BF16)
    exact = step(te, module, x, dy, None)
    for name in ("delayed", "mxfp8"):
        found = step(te, module, x, dy, recipe(name))
        gemms, quantizations = found[3].gemms, found[3].quantizations
        assert [gemm.quantized for gemm in gemms] == [True] * 6
        # The activation's kernel writes the second GEMM's input itself.
        assert [record.source for record in quantizations].count(activation) == 1
        for low, high in ((found[0], exact[0]), (found[1], exact[1])):
            error = (low.float() - high.float()).norm() / high.float().norm()
            assert 0.001 < error < 0.25  # relu's derivative jumps where a sign flips


@pytest.mark.parametrize("name", ["tensorwise", "mxfp8", "blockwise", "nvfp4"])
def test_saving_the_original_input_changes_no_number(te, tex, name):
    torch.manual_seed(1)
    plain, saving = (
        te.Linear(64, 96, params_dtype=BF16, device="cuda", save_original_input=flag)
        for flag in (False, True)
    )
    saving.load_state_dict(plain.state_dict())
    x, dy = torch.randn(128, 64).to(BF16), torch.randn(128, 96).to(BF16)
    expected, found = (step(te, module, x, dy, recipe(name)) for module in (plain, saving))
    equal(found, expected)
    assert [gemm.quantized for gemm in found[3].gemms] == [True] * 3
    # The input is quantised a second time, along its columns, when the backward pass needs it.
    inputs = [record for record in found[3].quantizations if record.shape == (128, 64)]
    assert len(inputs) > sum(record.shape == (128, 64) for record in expected[3].quantizations)


def test_delayed_scaling_does_not_save_the_original_input(te, tex):
    module = te.Linear(64, 96, params_dtype=BF16, device="cuda", save_original_input=True)
    with pytest.raises(SAVED_INPUT_REFUSAL, match="not supported with save_original_input"):
        step(te, module, torch.randn(32, 64).to(BF16), torch.randn(32, 96).to(BF16), recipe("delayed"))


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "hooks"])
@pytest.mark.parametrize("name", RECIPES)
def test_recomputed_activations_are_the_same(te, tex, name, use_reentrant):
    class Recomputed(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return te.checkpoint(self.layer, x, use_reentrant=use_reentrant)

    torch.manual_seed(2)
    layers = [
        te.LayerNormMLP(64, 128, activation="swiglu", params_dtype=BF16, device="cuda") for _ in range(2)
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    x, dy = torch.randn(64, 64).to(BF16), torch.randn(64, 64).to(BF16)
    expected = step(te, layers[0], x, dy, recipe(name))
    found = step(te, Recomputed(layers[1]), x, dy, recipe(name))
    found = (*found[:2], {key.removeprefix("layer."): grad for key, grad in found[2].items()}, found[3])
    equal(found, expected)
    assert len(expected[3].gemms) == 6
    assert len(found[3].gemms) == 8  # fprop's two GEMMs once more
    assert all(gemm.quantized for gemm in found[3].gemms)


@pytest.mark.parametrize("name", RECIPES)
def test_primary_weights_in_low_precision_multiply_like_weights_quantised_each_step(te, tex, name):
    from transformer_engine.pytorch.quantized_tensor import QuantizedTensor

    torch.manual_seed(4)
    plain = te.Linear(64, 128, bias=False, params_dtype=BF16, device="cuda")
    torch.manual_seed(4)
    with te.quantized_model_init(enabled=True, recipe=recipe(name), preserve_high_precision_init_val=True):
        primary = te.Linear(64, 128, bias=False, params_dtype=BF16, device="cuda")
    assert isinstance(primary.weight, QuantizedTensor)
    assert torch.equal(primary.weight.get_high_precision_init_val(), plain.weight)
    x, dy = torch.randn(64, 64).to(BF16), torch.randn(64, 128).to(BF16)
    expected, found = step(te, plain, x, dy, recipe(name)), step(te, primary, x, dy, recipe(name))
    equal(found, expected)
    assert [record.shape for record in expected[3].quantizations].count((128, 64)) == 1
    assert [record.shape for record in found[3].quantizations].count(
        (128, 64)
    ) == 0  # it is quantised already
