"""TE's modules under every recipe of the installed release, against products of what `numerics` quantises."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_fp8_recipes import emulation, numerics
from nemo_fp8_recipes.numerics import E4M3, E5M2, blockwise, hadamard, mxfp8, nvfp4, tensorwise
from nemo_fp8_recipes.numerics.delayed import update_amax_and_scale
from tests.support.te_release import RELEASE

pytestmark = pytest.mark.usefixtures("emulated")

TOKENS, INPUTS, OUTPUTS = 256, 128, 256
DIVIDED = RELEASE == "2.11"
HYBRID = {("TN", "e4m3", "e4m3"), ("NN", "e4m3", "e5m2"), ("NT", "e4m3", "e5m2")}
GEMMS = {
    "delayed": HYBRID,
    "tensorwise": HYBRID,
    "mxfp8": {(layout, "e4m3", "e4m3") for layout in ("TN", "NN", "NT")},
    "blockwise": {(layout, "e4m3", "e4m3") for layout in ("TN", "NN", "NT")},
    "nvfp4": {(layout, "e2m1", "e2m1") for layout in ("TN", "NN", "NT")},
}
MODULES = ("Linear", "LayerNormLinear", "LayerNormMLP", "GroupedLinear")


def te_recipe(name: str) -> Any:
    from transformer_engine.common import recipe

    if name == "nvfp4":
        return recipe.NVFP4BlockScaling(disable_stochastic_rounding=True)
    return {
        "delayed": recipe.DelayedScaling(amax_history_len=4),
        "tensorwise": recipe.Float8CurrentScaling(),
        "mxfp8": recipe.MXFP8BlockScaling(),
        "blockwise": recipe.Float8BlockScaling(),
    }[name]


def module(kind: str) -> Any:
    import transformer_engine.pytorch as te

    made: dict[str, Any] = {"params_dtype": torch.bfloat16, "bias": False}
    if kind == "LayerNormMLP":
        return te.LayerNormMLP(INPUTS, OUTPUTS, activation="swiglu", **made)
    if kind == "GroupedLinear":
        return te.GroupedLinear(2, INPUTS, OUTPUTS, **made)
    return getattr(te, kind)(INPUTS, OUTPUTS, **made)


def step(layer: Any, recipe: Any, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    import transformer_engine.pytorch as te

    splits = ([TOKENS // 2, TOKENS // 2],) if isinstance(layer, te.GroupedLinear) else ()
    with te.autocast(enabled=True, recipe=recipe):
        output = layer(x, *splits)
    output.backward(grad)
    return output


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("name", GEMMS)
def test_every_gemm_of_a_module_has_the_formats_of_the_recipe(name: str, kind: str) -> None:
    torch.manual_seed(3)
    layer, recipe = module(kind), te_recipe(name)
    x = torch.randn(TOKENS, INPUTS).bfloat16().requires_grad_()
    features = INPUTS if kind == "LayerNormMLP" else OUTPUTS
    with emulation.trace() as trace:
        for _ in range(2):
            step(layer, recipe, x, torch.randn(TOKENS, features).bfloat16())
    assert all(gemm.quantized for gemm in trace.gemms)
    assert {(gemm.layout, gemm.a.format, gemm.b.format) for gemm in trace.gemms} == GEMMS[name]
    linears = 2 if kind in ("LayerNormMLP", "GroupedLinear") else 1
    assert len(trace.gemms) == 2 * 3 * linears
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in layer.parameters())


def quantised(name: str, x: torch.Tensor, tensor: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of a tensor as its GEMMs read them along rows and along columns, float64."""
    fmt = E5M2 if tensor == "grad" and name in ("delayed", "tensorwise") else E4M3
    if name == "delayed":  # the first step, whose scale is 1
        values = numerics.decode(tensorwise.quantize(x, fmt, torch.ones(1)), fmt).double()
        return values, values
    if name == "tensorwise":
        found = tensorwise.quantize_current(x, fmt)
        values = numerics.decode(found.codes, fmt).double() * found.scale_inv.double()
        return values, values
    if name == "mxfp8":
        rows, columns = mxfp8.quantize_rowwise(x, fmt), mxfp8.quantize_columnwise(x, fmt)
        return (
            mxfp8.dequantize_rowwise(*rows, fmt).double(),
            mxfp8.dequantize_columnwise(*columns, fmt).double(),
        )
    if name == "blockwise":
        if tensor == "weight":
            values = blockwise.dequantize_2d(*blockwise.quantize_2d(x, fmt), fmt).double()
            return values, values
        rows, columns = blockwise.quantize_1d(x, fmt), blockwise.quantize_1d_columnwise(x, fmt)
        return (
            blockwise.dequantize_1d(*rows, fmt).double(),
            blockwise.dequantize_1d_columnwise(*columns, fmt).double(),
        )
    quantize = nvfp4.quantize_2d if tensor == "weight" else nvfp4.quantize_1d
    transposed = x.t().contiguous()
    if tensor != "weight":
        transposed = hadamard.random_hadamard_transform(transposed, hadamard.SIGN_MASK)
    rows, columns = (
        nvfp4.dequantize(
            *quantize(matrix, numerics.amax(matrix).reshape(1), divided=DIVIDED),
            numerics.amax(matrix).reshape(1),
        ).double()
        for matrix in (x, transposed)
    )
    return rows, columns.t()


@pytest.mark.parametrize("name", GEMMS)
def test_a_linear_multiplies_what_numerics_quantises(name: str) -> None:
    torch.manual_seed(5)
    layer = module("Linear")
    x = torch.randn(TOKENS, INPUTS).bfloat16().requires_grad_()
    grad = torch.randn(TOKENS, OUTPUTS).bfloat16()
    y = step(layer, te_recipe(name), x, grad)
    x_rows, x_columns = quantised(name, x.detach(), "input")
    w_rows, w_columns = quantised(name, layer.weight.detach(), "weight")
    g_rows, g_columns = quantised(name, grad, "grad")
    # The Hadamard transform is orthogonal and cancels in the product of two transformed operands.
    for found, expected in (
        (y, x_rows @ w_rows.t()),
        (x.grad, g_rows @ w_columns),
        (layer.weight.grad, g_columns.t() @ x_columns),
    ):
        error = (found.detach().double() - expected).abs()
        assert (error <= 2.0**-8 * expected.abs() + 1e-6 * expected.abs().max()).all()


def test_delayed_scaling_updates_its_histories_and_scales_as_numerics_does() -> None:
    torch.manual_seed(7)
    layer, recipe = module("Linear"), te_recipe("delayed")
    history, scale = {}, {}
    for number in range(5):
        x = (torch.randn(TOKENS, INPUTS) * 2.0**number).bfloat16()
        grad = (torch.randn(TOKENS, OUTPUTS) / 2.0**number).bfloat16()
        step(layer, recipe, x.requires_grad_(), grad)
        observed = {
            "scaling_fwd": torch.stack([numerics.amax(x), numerics.amax(layer.weight)]),
            "scaling_bwd": numerics.amax(grad).reshape(1),
        }
        for direction, amaxes in observed.items():
            history.setdefault(direction, torch.zeros(4, len(amaxes)))[0] = amaxes
            update_amax_and_scale(
                [history[direction]],
                [scale.setdefault(direction, torch.ones(len(amaxes)))],
                amaxes,
                algorithm="max",
                fp8_max=(E4M3 if direction == "scaling_fwd" else E5M2).max,
                margin=0.0,
            )
            found = layer.fp8_meta[direction]
            assert torch.equal(found.scale[: len(amaxes)], scale[direction])
            assert torch.equal(found.amax_history[:, : len(amaxes)], history[direction])


@pytest.mark.parametrize("name", ["delayed", "mxfp8"])
def test_an_extra_state_restores_what_the_next_step_computes(name: str) -> None:
    from nemo_fp8_recipes.injection.extra_state import loadable_extra_state

    torch.manual_seed(9)
    layer, recipe = module("Linear"), te_recipe(name)
    x, grad = torch.randn(TOKENS, INPUTS).bfloat16(), torch.randn(TOKENS, OUTPUTS).bfloat16()
    for _ in range(2):
        step(layer, recipe, x.clone().requires_grad_(), grad)
    saved = {
        key: value.clone() if torch.is_tensor(value) else value for key, value in layer.state_dict().items()
    }
    other = module("Linear")
    with loadable_extra_state():
        other.load_state_dict(saved)
    assert torch.equal(step(other, recipe, x, grad), step(layer, recipe, x.clone().requires_grad_(), grad))
