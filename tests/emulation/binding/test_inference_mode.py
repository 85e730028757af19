"""An evaluation under `torch.inference_mode()`, as Lightning runs it, and training after it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

RECIPES = ("DelayedScaling", "Float8CurrentScaling", "MXFP8BlockScaling", "Float8BlockScaling")


def outcome(te: ModuleType, recipe: Any, evaluation: Any) -> list[torch.Tensor]:
    """Outputs and gradients of two steps after an evaluation in some mode."""
    torch.manual_seed(5)
    layer = te.Linear(64, 64, params_dtype=torch.bfloat16, device="cuda")
    x = torch.randn(64, 64, dtype=torch.bfloat16, device="cuda")
    with evaluation, te.autocast(enabled=True, recipe=recipe):
        layer(x)
    seen: list[torch.Tensor] = []
    for _ in range(2):
        own = x.clone().requires_grad_()
        with te.autocast(enabled=True, recipe=recipe):
            y = layer(own)
        (y * y).sum().backward()
        assert own.grad is not None
        seen += [y.detach(), own.grad, layer.weight.grad.clone()]
        layer.weight.grad = None
    return seen


@pytest.mark.parametrize("name", RECIPES)
def test_what_an_evaluation_in_inference_mode_made_is_written_to_in_training(
    te: ModuleType, name: str
) -> None:
    from transformer_engine.common import recipe as recipes

    make = getattr(recipes, name)
    after_inference = outcome(te, make(), torch.inference_mode())
    expected = outcome(te, make(), torch.no_grad())
    assert len(expected) == 6
    for one, other in zip(after_inference, expected, strict=True):
        assert torch.equal(one, other)


def test_buffers_made_in_inference_mode_take_codes_amax_and_scale(te: ModuleType, tex: ModuleType) -> None:
    x = torch.randn(32, 32, device="cuda")
    with torch.inference_mode():
        quantizer = te.Float8Quantizer(torch.ones(1), torch.zeros(1), te.DType.kFloat8E4M3)
        kept = quantizer(torch.zeros(32, 32, device="cuda"))
        amax = torch.zeros(1, device="cuda")
    tex.quantize(x, quantizer, kept, None)
    tex.compute_amax(x, amax)
    assert quantizer.amax.item() == amax.item() == x.abs().max().item()
    assert torch.equal(kept._data, tex.quantize(x, quantizer, None, None)._data)
