"""Injection on Megatron-Core's GPTModel with Transformer Engine's layers: it arrives, or it is refused."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch

from nemo_fp8_recipes import recipes
from nemo_fp8_recipes.errors import InjectionError
from nemo_fp8_recipes.injection import autocast, complaints, inject, manifest, require_quantized
from tests.support.te_release import since, skip_unknown

from . import gpt

pytestmark = pytest.mark.usefixtures("megatron")

FP8 = ["delayed", "tensorwise", "mxfp8", "blockwise"]


def trained(recipe, *, steps=1, config=None, **overrides):
    """A model trained under the injected recipe, and the injection."""
    config = config or gpt.config_of(recipe, **overrides)
    with inject(recipe, config=config) as injection:
        model = gpt.build(config)
        for step in range(steps):
            gpt.train_step(model, seed=step)
    return model, injection


@pytest.mark.parametrize("name", FP8)
def test_every_linear_layer_runs_the_recipe(name):
    recipe = recipes.load(name)
    model, injection = trained(recipe)
    found = manifest(model, recipe)
    require_quantized(found, recipe)
    assert [row.module for row in found.quantized()] == [
        named for named, module in model.named_modules() if named.endswith(gpt.LINEARS)
    ]
    assert {row.recipe for row in found.quantized()} == {name}
    assert injection.calls > 0


@pytest.mark.parametrize("name", FP8)
def test_the_gemms_multiply_what_the_recipe_says(name, trace):
    recipe = recipes.load(name, **({} if name == "delayed" else {"fp8_format": "hybrid"}))
    with trace() as observed:
        trained(recipe)
    quantized = [gemm for gemm in observed.gemms if gemm.quantized]
    assert len(quantized) == 2 * len(gpt.LINEARS) * 3
    formats = {(gemm.layout, gemm.a.format, gemm.b.format) for gemm in quantized}
    # Hybrid: E4M3 inputs and weights, E5M2 gradients. A is weight, weight, input; B is input, gradient,
    # gradient.
    assert formats == {("TN", "e4m3", "e4m3"), ("NN", "e4m3", "e5m2"), ("NT", "e4m3", "e5m2")}


# Options that Megatron cannot express, or that Transformer Engine drops on the way, and what the quantizers
# in use
# must then have: (tensor, attribute of its manifest operand, value).
OPTIONS = [
    (
        "tensorwise",
        {"use_power_2_scales": True},
        [(t, "power_of_two", True) for t in ("input", "weight", "grad_output")],
    ),
    (
        "tensorwise",
        {"amax_epsilon": 0.125},
        [(t, "amax_epsilon", 0.125) for t in ("input", "weight", "grad_output")],
    ),
    (
        "tensorwise",
        {"fp8_quant_fwd_weight": {"power_2_scale": True}},
        [("weight", "power_of_two", True), ("input", "power_of_two", False)],
    ),
    ("tensorwise", {"fp8_format": "e4m3"}, [("grad_output", "format", "e4m3")]),
    ("blockwise", {"w_block_scaling_dim": 1}, [("weight", "block", (1, 128))]),
    (
        "blockwise",
        {"w_block_scaling_dim": 1, "x_block_scaling_dim": 2},
        [("weight", "block", (1, 128)), ("input", "block", (128, 128))],
    ),
    (
        "blockwise",
        {"amax_epsilon": 0.125},
        [(t, "amax_epsilon", 0.125) for t in ("input", "weight", "grad_output")],
    ),
    ("mxfp8", {"fp8_format": "hybrid"}, [("grad_output", "format", "e5m2"), ("input", "format", "e4m3")]),
    ("mxfp8", {"enable_2d_quantization": True}, [("weight", "block", (32, 32)), ("input", "block", (1, 32))]),
    (
        "delayed",
        {"amax_history_len": 7},
        [(t, "amax_history_len", 7) for t in ("input", "weight", "grad_output")],
    ),
]


@pytest.mark.parametrize(("name", "options", "expected"), OPTIONS)
def test_an_option_reaches_the_quantizers_in_use(name, options, expected):
    recipe = recipes.load(name, **options)
    skip_unknown(recipe)
    model, _ = trained(recipe)
    found = manifest(model)
    require_quantized(found, recipe)
    for row in found.quantized():
        for tensor, attribute, value in expected:
            assert getattr(getattr(row, tensor), attribute) == value, row.module


def test_options_reach_the_quantizations_themselves(trace):
    with trace() as observed:
        trained(recipes.load("tensorwise", use_power_2_scales=True, amax_epsilon=0.125))
    assert observed.quantizations
    assert {(q.force_pow_2_scales, q.amax_epsilon) for q in observed.quantizations} == {(True, 0.125)}


def test_accumulation_options_reach_the_gemms(trace):
    split, fast = {"use_split_accumulator": True}, {"use_split_accumulator": False}
    recipe = recipes.load("tensorwise", fp8_gemm_fprop=split, fp8_gemm_dgrad=fast, fp8_gemm_wgrad=split)
    with trace() as observed:
        trained(recipe)
    found = {(gemm.layout, gemm.split_accumulator) for gemm in observed.gemms if gemm.quantized}
    assert found == {("TN", True), ("NN", False), ("NT", True)}


@pytest.mark.parametrize("name", ["tensorwise", "mxfp8", "blockwise"])
@pytest.mark.parametrize("override", ["high_precision", "dequantized"])
@since("2.15")
def test_backward_override_leaves_backward_in_high_precision(name, override, trace):
    recipe = recipes.load(name, backward_override=override)
    with trace() as observed:
        model, _ = trained(recipe)
    quantized = [gemm for gemm in observed.gemms if gemm.quantized]
    assert {gemm.layout for gemm in quantized} == {"TN"}
    assert len(quantized) == 2 * len(gpt.LINEARS)
    found = manifest(model)
    require_quantized(found, recipe)
    for row in found.quantized():
        assert (row.backward_override, row.grad_output.format) == (override, "bfloat16")


def test_delayed_follows_its_margin_and_history():
    """scale = FP8 max / (max of the history) / 2^margin; the newest amax is the last row after the update."""
    recipe = recipes.load("delayed", margin=2, amax_history_len=4)
    model, _ = trained(recipe, steps=3)
    for name, module in model.named_modules():
        if name.endswith(gpt.LINEARS):
            for state, fp8_max in (
                (module.fp8_meta["scaling_fwd"], 448.0),
                (module.fp8_meta["scaling_bwd"], 57344.0),
            ):
                assert state.amax_history.shape[0] == 4
                used = state.amax_history.amax(0) > 0
                expected = fp8_max / 4 / state.amax_history.amax(0)
                torch.testing.assert_close(state.scale[used], expected[used], rtol=1e-6, atol=0)


def test_delayed_hands_over_megatrons_own_class_with_every_option():
    from megatron.core.extensions.transformer_engine import TEDelayedScaling

    recipe = recipes.load(
        "delayed", margin=1, amax_history_len=9, amax_compute_algo="most_recent", reduce_amax=False
    )
    with inject(recipe) as injection:
        handed = injection.te_object
    assert type(handed) is TEDelayedScaling
    built = vars(recipe.te())
    assert {key: value for key, value in vars(handed).items() if key != "_cached_repr"} == {
        key: value for key, value in built.items() if key != "_cached_repr"
    }
    assert (handed.margin, handed.amax_history_len, handed.reduce_amax) == (1, 9, False)


def most_recent(history):
    return history[0].clone()


def test_delayed_takes_a_function_as_algorithm():
    recipe = recipes.load("delayed", amax_compute_algo=f"{__name__}:most_recent", amax_history_len=4)
    model, injection = trained(recipe, steps=2)
    assert injection.te_object.amax_compute_algo is most_recent
    require_quantized(manifest(model), recipe)


@pytest.mark.parametrize("name", FP8)
def test_primary_weights_are_made_by_the_injected_object(name):
    recipe = recipes.load(name, fp8_param=True)
    model, _ = trained(recipe)
    found = manifest(model)
    require_quantized(found, recipe)
    assert {row.primary_weight_dtype for row in found.quantized()} == {"e4m3"}
    for row in found.rows:
        if not row.quantized and row.module == "output_layer":
            assert row.primary_weight_dtype == "bfloat16"


def test_primary_weights_take_options_that_megatron_lacks():
    recipe = recipes.load("blockwise", fp8_param=True, w_block_scaling_dim=1)
    model, _ = trained(recipe)
    weight = model.decoder.layers[0].mlp.linear_fc1.weight
    assert weight._quantizer.block_scaling_dim == 1
    assert not weight._is_2D_scaled


def test_first_and_last_layers_stay_in_bf16_with_their_reason():
    recipe = recipes.load("tensorwise", num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=1)
    model, _ = trained(recipe, layers=3)
    found = manifest(model)
    require_quantized(found, recipe)
    assert {row.module.split(".")[2] for row in found.quantized()} == {"1"}
    reasons = {row.module: row.reason_code for row in found.rows if row.module.endswith("linear_fc1")}
    assert reasons == {
        "decoder.layers.0.mlp.linear_fc1": "bf16_layer",
        "decoder.layers.1.mlp.linear_fc1": None,
        "decoder.layers.2.mlp.linear_fc1": "bf16_layer",
    }


# -- an injection that does not do its work is noticed ---------------------------------------------


def test_without_injection_the_option_is_missed():
    recipe = recipes.load("tensorwise", use_power_2_scales=True)
    model = gpt.build(gpt.config_of(recipe))
    gpt.train_step(model)
    found = complaints(manifest(model), recipe)
    assert {complaint.text for complaint in found} == {
        f"{tensor} has power_of_two=False, the recipe says True"
        for tensor in ("input", "weight", "grad_output")
    }


def test_a_context_that_is_never_entered_is_noticed():
    recipe = recipes.load("mxfp8")
    with inject(recipe) as injection:
        model = gpt.build(gpt.config_of(None))
        gpt.train_step(model)
    assert injection.calls == 0
    with pytest.raises(InjectionError, match="ran outside every FP8 context"):
        require_quantized(manifest(model), recipe)


def test_swapped_formats_are_noticed(monkeypatch):
    """E5M2 for the input and E4M3 for the gradient: the loss looks the same."""
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.quantization import Float8CurrentScalingRecipeState

    make = Float8CurrentScalingRecipeState.make_quantizers

    def swapped(state):
        quantizers = make(state)
        wrong = tex.DType.kFloat8E5M2 if state.mode == "forward" else tex.DType.kFloat8E4M3
        quantizers[0].dtype = type(quantizers[0].dtype)(int(wrong))
        return quantizers

    monkeypatch.setattr(Float8CurrentScalingRecipeState, "make_quantizers", swapped)
    recipe = recipes.load("tensorwise")
    model, _ = trained(recipe)
    assert {complaint.text for complaint in complaints(manifest(model), recipe)} == {
        "input has format=e5m2, the recipe says e4m3",
        "grad_output has format=e4m3, the recipe says e5m2",
    }


@pytest.mark.parametrize(
    ("injected", "configured", "key"),
    [("blockwise", "mxfp8", "fp8_recipe"), ("tensorwise", "delayed", "fp8_recipe"), ("bf16", "mxfp8", "fp8")],
)
def test_another_kind_than_the_configs_is_refused_when_megatron_asks(injected, configured, key):
    config = gpt.config_of(recipes.load(configured, fp8_format="e4m3"))
    recipe = recipes.load(injected) if injected == "bf16" else recipes.load(injected, fp8_format="e4m3")
    with inject(recipe):
        model = gpt.build(config)
        with pytest.raises(InjectionError, match=f"injected recipe '{injected}'") as raised:
            gpt.train_step(model)
    assert raised.value.key == key


def test_another_kind_is_refused_before_the_model_is_built():
    config = gpt.config_of(recipes.load("mxfp8"))
    with (
        pytest.raises(InjectionError, match="fp8_recipe=mxfp8"),
        inject(recipes.load("blockwise"), config=config),
    ):
        pytest.fail("entered")
    with inject(recipes.load("mxfp8"), config=config):  # and the refusal left nothing behind
        pass


def test_an_fp4_config_is_refused_by_an_fp8_recipe():
    config = gpt.config_of(None, fp4="e2m1")
    from megatron.core import fp4_utils

    with inject(recipes.load("mxfp8")), pytest.raises(InjectionError, match="needs fp8=e4m3"):
        fp4_utils.get_fp4_recipe(config)


def test_bf16_quantises_nothing(trace):
    recipe = recipes.load("bf16")
    with trace() as observed:
        model, injection = trained(recipe)
    assert not any(gemm.quantized for gemm in observed.gemms)
    assert injection.te_object is None
    require_quantized(manifest(model), recipe)


# -- what is touched is restored -------------------------------------------------------------------


def seams():
    from megatron.core import fp4_utils, fp8_utils

    return fp8_utils.get_fp8_recipe, fp4_utils.get_fp4_recipe


def test_megatrons_functions_are_restored():
    before = seams()
    with inject(recipes.load("mxfp8")):
        assert seams() != before
    assert seams() == before


def test_megatrons_functions_are_restored_after_an_error():
    before = seams()
    with contextlib.suppress(ZeroDivisionError), inject(recipes.load("mxfp8")):
        raise ZeroDivisionError
    assert seams() == before
    with inject(recipes.load("mxfp8")):
        pass


def test_after_injection_megatron_uses_its_own_object_again():
    config = gpt.config_of(recipes.load("tensorwise", use_power_2_scales=True))
    with inject(recipes.load("tensorwise", use_power_2_scales=True)) as injection:
        assert seams()[0](config) is injection.te_object
    assert seams()[0](config) is not injection.te_object
    assert not seams()[0](config).use_power_2_scales


def test_a_replacement_made_meanwhile_is_left_alone_and_said():
    from megatron.core import fp8_utils

    original = fp8_utils.get_fp8_recipe
    recipe = recipes.load("mxfp8")
    config = gpt.config_of(recipe)
    try:
        context = inject(recipe)
        injection = context.__enter__()
        ours = fp8_utils.get_fp8_recipe

        def theirs(config):
            return ours(config)

        fp8_utils.get_fp8_recipe = theirs
        with pytest.warns(UserWarning, match="get_fp8_recipe was replaced"):
            context.__exit__(None, None, None)
        assert fp8_utils.get_fp8_recipe is theirs
        assert theirs(config) is not injection.te_object  # ours passes on to Megatron's own function
    finally:
        fp8_utils.get_fp8_recipe = original


def test_a_second_injection_is_refused_and_names_the_first():
    with inject(recipes.load("mxfp8")):
        with (
            pytest.raises(InjectionError, match="'mxfp8' is injected already"),
            inject(recipes.load("mxfp8")),
        ):
            pytest.fail("entered")
        with pytest.raises(InjectionError, match="'mxfp8' is injected already"), inject(recipes.load("bf16")):
            pytest.fail("entered")


def test_injection_inside_a_transformer_engine_context_is_refused():
    recipe = recipes.load("mxfp8")
    with autocast(recipe), pytest.raises(InjectionError, match="context is open"), inject(recipe):
        pytest.fail("entered")
    with inject(recipe):
        pass


def test_injection_holds_for_every_thread():
    """Autograd recomputes activations, and enters FP8 contexts, in threads of its own."""
    recipe = recipes.load("mxfp8")
    config = gpt.config_of(recipe)
    seen: list[object] = []

    def elsewhere() -> None:
        seen.append(seams()[0](config))
        try:
            with inject(recipe):
                seen.append("entered")
        except InjectionError as error:
            seen.append(type(error))

    with inject(recipe) as injection:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert seen == [injection.te_object, InjectionError]


def test_recomputed_activations_run_the_same_recipe(trace):
    recipe = recipes.load("tensorwise", use_power_2_scales=True)
    with trace() as observed:
        model, _ = trained(
            recipe, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
        )
    require_quantized(manifest(model), recipe)
    assert {q.force_pow_2_scales for q in observed.quantizations} == {True}


# -- plain Transformer Engine ----------------------------------------------------------------------


@pytest.mark.parametrize("name", FP8)
def test_autocast_quantises_a_plain_linear_layer(name):
    import transformer_engine.pytorch as te

    recipe = recipes.load(name)
    layer = te.Linear(64, 64, params_dtype=torch.bfloat16, bias=False, device="cpu")
    with autocast(recipe):
        y = layer(torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True))
    y.float().sum().backward()
    found = manifest(layer)
    assert [row.module for row in found.rows] == [""]
    require_quantized(found, recipe)


def test_autocast_of_bf16_quantises_nothing():
    import transformer_engine.pytorch as te

    layer = te.Linear(64, 64, params_dtype=torch.bfloat16, bias=False, device="cpu")
    with autocast(recipes.load("bf16")):
        layer(torch.randn(32, 64, dtype=torch.bfloat16))
    require_quantized(manifest(layer), recipes.load("bf16"))


def test_the_manifest_knows_the_device_and_what_is_not_transformer_engines():
    recipe = recipes.load("mxfp8")
    model, _ = trained(recipe)
    found = manifest(model)
    (device,) = {row.device for row in found.rows}
    assert "B200" in device
    assert "emulated" in device
    assert found.row("output_layer").reason_code == "output_layer"
    assert found.row("decoder.layers.0.self_attention.core_attention").reason_code == "attention"
