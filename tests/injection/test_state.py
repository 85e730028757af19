"""Starting Transformer Engine's quantisation state afresh: returning to delayed scaling, changing options."""

from __future__ import annotations

import pytest

from nemo_fp8_recipes import recipes
from nemo_fp8_recipes.errors import InjectionError
from nemo_fp8_recipes.injection import (
    autocast,
    complaints,
    frozen_delayed_modules,
    inject,
    manifest,
    require_quantized,
    reset_quantization_state,
)

from . import gpt

pytestmark = pytest.mark.usefixtures("megatron")

DELAYED = {"amax_history_len": 4}


def run(model, recipe, *, steps=2):
    """Train on with another recipe, as a schedule would: Megatron's config and the injection change
    together.
    """
    for field, value in recipe.megatron().items():
        setattr(model.config, field, value)
    with inject(recipe):
        for step in range(steps):
            gpt.train_step(model, seed=step)


def delayed_model():
    recipe = recipes.load("delayed", **DELAYED)
    model = gpt.build(gpt.config_of(recipe))
    run(model, recipe)
    return model, recipe


def scales(model):
    return [
        state.scale.tolist()
        for name, module in model.named_modules()
        if name.endswith(gpt.LINEARS)
        for state in (module.fp8_meta["scaling_fwd"], module.fp8_meta["scaling_bwd"])
    ]


def test_returning_to_delayed_scaling_without_a_reset_is_frozen_and_seen():
    model, recipe = delayed_model()
    assert frozen_delayed_modules(model) == ()
    run(model, recipes.load("mxfp8"))
    run(model, recipe)
    frozen = [path for path in frozen_delayed_modules(model) if path.endswith(gpt.LINEARS)]
    assert len(frozen) == 2 * len(gpt.LINEARS)
    assert all(scale == 1.0 for scales_of_state in scales(model) for scale in scales_of_state)


def test_returning_to_delayed_scaling_after_a_reset_updates_its_scales():
    model, recipe = delayed_model()
    run(model, recipes.load("mxfp8"))
    reset_quantization_state(model)
    run(model, recipe)
    assert frozen_delayed_modules(model) == ()
    require_quantized(manifest(model), recipe)
    # Columns input and weight, grad_output: the others are never written.
    assert all(scales_of_state[0] != 1.0 for scales_of_state in scales(model))


def test_a_reset_starts_delayed_scaling_as_a_new_model_does():
    model, recipe = delayed_model()
    reset_quantization_state(model)
    run(model, recipe, steps=1)
    fresh = model.decoder.layers[0].mlp.linear_fc1.fp8_meta["scaling_fwd"].amax_history
    assert fresh[-1, 0] > 0
    assert (fresh[:-1] == 0).all()


def test_changed_options_of_the_same_recipe_need_a_reset():
    first, second = recipes.load("blockwise"), recipes.load("blockwise", w_block_scaling_dim=1)
    model = gpt.build(gpt.config_of(first))
    run(model, first)
    run(model, second)
    assert {complaint.text for complaint in complaints(manifest(model), second)} == {
        "weight has block=(128, 128), the recipe says (1, 128)"
    }
    reset_quantization_state(model)
    run(model, second)
    require_quantized(manifest(model), second)


def test_quantizers_that_outlive_their_recipe_do_not_count():
    """A BF16 phase leaves the quantizers of the phase before in place: what counts is the last forward."""
    mxfp8 = recipes.load("mxfp8")
    model = gpt.build(gpt.config_of(mxfp8))
    run(model, mxfp8)
    run(model, recipes.load("bf16"))
    assert model.decoder.layers[0].mlp.linear_fc1.quantizers["scaling_fwd"]
    assert manifest(model).quantized() == ()
    with pytest.raises(InjectionError, match="ran outside every FP8 context"):
        require_quantized(manifest(model), mxfp8)


def test_a_reset_leaves_the_parameters_alone():
    model, _ = delayed_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    reset_quantization_state(model)
    assert all((before[name] == parameter).all() for name, parameter in model.named_parameters())


def test_a_checkpoint_can_be_saved_right_after_a_reset():
    model, _ = delayed_model()
    reset_quantization_state(model)
    saved = [state for name, state in model.state_dict().items() if name.endswith("linear_fc1._extra_state")]
    assert len(saved) == 2
    assert all(state.numel() == 0 for state in saved)


def test_a_reset_inside_a_context_is_refused():
    model, recipe = delayed_model()
    with autocast(recipe), pytest.raises(InjectionError, match="inside a Transformer Engine FP8 context"):
        reset_quantization_state(model)


def test_quantised_primary_weights_keep_their_recipe():
    recipe = recipes.load("mxfp8", fp8_param=True)
    with inject(recipe):
        model = gpt.build(gpt.config_of(recipe))
    with pytest.raises(InjectionError, match="primary weight is stored quantised"):
        reset_quantization_state(model)


def test_other_models_with_delayed_scaling_must_be_passed_too():
    first, _ = delayed_model()
    second, _ = delayed_model()
    with pytest.raises(InjectionError, match="every chunk"):
        reset_quantization_state(first)
    reset_quantization_state([first, second])
