"""Which quantised operands count: not those of an evaluation, of a repeated forward pass, of a capture."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_fp8_recipes.numerics import E4M3, tensorwise
from nemo_fp8_recipes.telemetry.elements import MEASURED, measure
from nemo_fp8_recipes.telemetry.linears import Linear
from nemo_fp8_recipes.telemetry.observer import Observer
from nemo_fp8_recipes.telemetry.seam import Asking, BindingSeam


def te_class(name: str, base: str, **attributes: Any) -> Any:
    """A class that is recognised as one of Transformer Engine's."""
    parent = type(base, (), {"__module__": "transformer_engine.stand_in"})
    return type(name, (parent,), {"__module__": "transformer_engine.stand_in", **attributes})


class Dtype:
    name = "kFloat8E4M3"


QUANTIZER = te_class("Float8CurrentScalingQuantizer", "Quantizer", dtype=Dtype(), force_pow_2_scales=False)
TENSOR = te_class("Float8Tensor", "QuantizedTensorStorage")


class Module(torch.nn.Module):
    """What is read of a Transformer Engine linear."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(1))
        self.fp8 = True
        self.fp8_meta: dict[str, Any] = {}
        self.quantizers = {"scaling_fwd": [QUANTIZER() for _ in range(3)], "scaling_bwd": [QUANTIZER(), None]}
        self._fp8_workspaces: dict[str, Any] = {}


def quantize(x: Tensor, quantizer: Any) -> Any:
    made = tensorwise.quantize_current(x, E4M3)
    tensor = TENSOR()
    tensor._data, tensor._transpose, tensor._scale_inv = made.codes, None, made.scale_inv
    return tensor


class Watched:
    """An observer of one module, in a step that reads the tensors."""

    def __init__(self) -> None:
        self.module = Module()
        self.observer = Observer(torch.nn.Identity(), history=False)
        self.observer._linears = (Linear("m", self.module, 0),)
        self.observer._stats = True
        self.call = self.observer._quantising("quantize", quantize)
        self.input, self.weight, _ = self.module.quantizers["scaling_fwd"]

    def end(self) -> dict[tuple[str, str], float]:
        reading = self.observer.end()
        assert reading is not None
        named = zip(reading.specs, reading.values.tolist(), strict=True)
        return {(spec.tensor, spec.name): value for spec, value in named}


def test_an_evaluation_does_not_count() -> None:
    watched = Watched()
    watched.call(torch.ones(4, 16), watched.input)
    watched.module.eval()
    watched.call(torch.full((4, 16), 100.0), watched.input)
    watched.module.train()
    found = watched.end()
    assert found["input", "elements"] == 64
    assert found["input", "largest"] == 1
    assert found["input", "scale_inv"] == pytest.approx(1 / 448)


def test_a_forward_pass_repeated_in_the_backward_pass_counts_once() -> None:
    watched = Watched()

    class Recomputed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            watched.call(x.detach(), watched.input)
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            watched.call(ctx.saved_tensors[0].detach(), watched.input)
            return gradient

    for _ in range(2):  # micro-batches
        Recomputed.apply(torch.ones(4, 16, requires_grad=True)).sum().backward()
    assert watched.end()["input", "elements"] == 2 * 64


def test_a_weight_that_every_micro_batch_quantises_is_read_once() -> None:
    watched = Watched()
    for _ in range(3):
        watched.call(torch.ones(4, 16), watched.weight)
    assert watched.end()["weight", "elements"] == 64


@pytest.mark.parametrize("recipe", ["Float8Quantizer", "Float8CurrentScalingQuantizer"])
def test_a_primary_weight_is_read_before_the_optimizer_writes_it(recipe: str) -> None:
    """Also under delayed scaling, of which a quantising call says nothing."""
    watched = Watched()
    kind = te_class(recipe, "Quantizer", dtype=Dtype(), force_pow_2_scales=False)
    watched.module.quantizers["scaling_fwd"][1] = watched.weight = kind()
    watched.module.quantizers["scaling_bwd"][0] = gradient = kind()
    weight: Any = quantize(torch.ones(4, 16), watched.weight)
    weight._quantizer, weight.device = watched.weight, torch.device("cpu")
    weight.shape, weight.numel = (4, 16), lambda: 64
    weight.main_param = torch.full((4, 16), 3.0)
    watched.module.weight = weight
    watched.call(torch.ones(4, 16), watched.input)
    watched.call(torch.ones(4, 16), gradient)
    weight.main_param.fill_(5.0)
    assert watched.end()["weight", "largest"] == 3.0


def test_an_absent_argument_is_not_the_quantizer_that_a_module_lacks() -> None:
    watched = Watched()
    watched.observer._stats = False
    watched.module.quantizers["scaling_bwd"] = [None, None]
    call = watched.observer._quantising(
        "layernorm_fwd", lambda x, bias, quantizer: (quantize(x, quantizer), None)
    )
    call(torch.full((4, 16), 2.0), None, watched.input)
    assert watched.end()["input", "scale_inv"] == pytest.approx(2 / 448)


def test_what_was_not_seen_says_so() -> None:
    found = Watched().end()
    assert found == {(tensor, "unobserved"): 1.0 for tensor in ("input", "weight", "grad_output")}


def test_an_expert_without_tokens_was_seen_and_has_no_statistics() -> None:
    watched = Watched()
    watched.call(torch.ones(4, 16), watched.weight)
    watched.call(torch.ones(0, 16), watched.input)
    found = watched.end()
    assert ("input", "elements") not in found
    assert not [name for _, name in found if name == "unobserved"]


def test_what_is_quantised_for_all_experts_at_once_says_so() -> None:
    watched = Watched()
    watched.module.use_grouped_tensor = True
    watched.call(torch.ones(4, 16), watched.weight)
    found = watched.end()
    assert {tensor for tensor, name in found if name == "unobserved"} == {"input", "grad_output"}
    assert found["weight", "elements"] == 64


def test_a_grouped_linear_that_quantises_each_expert_by_itself_is_seen() -> None:
    watched = Watched()
    watched.module.use_grouped_tensor = True
    watched.call(torch.ones(4, 16), watched.weight)
    watched.call(torch.ones(0, 16), watched.input)  # without tokens
    watched.call(torch.ones(0, 16), watched.module.quantizers["scaling_bwd"][0])
    assert not [name for _, name in watched.end() if name == "unobserved"]


def test_nothing_of_ours_runs_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def wrapper(original: Any) -> Any:
        return lambda: ran.append("ours") or original()

    seam = BindingSeam({}, {})
    seam._open = True
    guarded = seam._guarded(lambda: "theirs", wrapper)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert (guarded(), ran) == ("theirs", [])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert (guarded(), ran) == ("theirs", ["ours"])


@pytest.mark.parametrize("stats", [False, True])
def test_an_observer_that_is_idle_sees_nothing(stats: bool) -> None:
    watched = Watched()
    watched.observer._stats = stats
    idle = [False]
    call = watched.observer._quantising("quantize", quantize, lambda: idle[0])
    call(torch.full((4, 16), 2.0), watched.input)
    idle[0] = True
    call(torch.full((4, 16), 8.0), watched.input)
    call(torch.full((4, 16), 8.0), watched.weight)
    found = watched.end()
    assert found["input", "scale_inv"] == pytest.approx(2 / 448)
    assert not [name for tensor, name in found if tensor == "weight" and name != "unobserved"]


def test_the_seam_hands_out_whether_it_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    seam = BindingSeam({}, {})

    def wrap(_: Any, idle: Any) -> Any:
        def call() -> bool:
            answer: bool = idle()
            return answer

        return call

    answers = seam._guarded(lambda: None, Asking(wrap))
    assert answers()  # closed
    seam._open = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert not answers()
    seam._capture_flags = (lambda: False, lambda: True)
    assert answers()
    seam._capture_flags = ()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert answers()


def test_elements_that_are_no_numbers_count_apart() -> None:
    x = torch.tensor([[0.0, 1.0, math.nan, -math.inf, 1e-3, 500.0]])
    values = torch.tensor([[0.0, 1.0, math.nan, -448.0, 0.0, 448.0]])
    named = dict(
        zip([name for name, _ in MEASURED], measure(x, values, torch.tensor(448.0)).tolist(), strict=True)
    )
    assert named["elements"] == 6
    assert named["nonfinite"] == 2
    assert named["zero_elements"] == 1
    assert named["underflows"] == 1
    assert named["saturated"] == 1
    assert named["largest"] == 500
    assert named["norm"] == pytest.approx(1 + 1e-6 + 500**2)
    assert named["noise"] == pytest.approx(1e-6 + 52**2)
