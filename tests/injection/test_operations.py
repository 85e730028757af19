"""Linear layers that run as operations of Transformer Engine: alone, and in Megatron's fused MLP, where they
are read by the names of the modules.
"""

from __future__ import annotations

import copy

import pytest
import torch

from nemo_fp8_recipes import recipes
from nemo_fp8_recipes.errors import InjectionError
from nemo_fp8_recipes.injection import (
    autocast,
    inject,
    manifest,
    require_quantized,
    reset_quantization_state,
    switch,
)
from nemo_fp8_recipes.telemetry.elements import MEASURED
from nemo_fp8_recipes.telemetry.linears import linears
from nemo_fp8_recipes.telemetry.observer import Observer
from tests.support.te_release import since

from . import gpt

pytestmark = pytest.mark.usefixtures("megatron")

FP8 = [
    "delayed",
    "tensorwise",
    "mxfp8",
    "nvfp4",
    pytest.param("blockwise", marks=since("2.20")),  # operations refuse it before
]
FUSED = ("mlp.linear_fc1", "mlp.linear_fc2")


def build(recipe):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    config = gpt.config_of(recipe, layers=1)
    return gpt.build(config, spec=get_gpt_layer_with_transformer_engine_spec(use_te_op_fuser=True)), config


@pytest.mark.parametrize("name", FP8)
def test_the_operations_are_read_back_by_the_modules_names(name, trace):
    recipe = recipes.load(name)
    model, config = build(recipe)
    with inject(recipe, config=config), trace() as observed:
        gpt.train_step(model)
    found = manifest(model, recipe)
    require_quantized(found, recipe)
    rows = {row.module: row for row in found.quantized()}
    assert {path.removeprefix("decoder.layers.0.") for path in rows} == set(gpt.LINEARS)
    assert {rows[f"decoder.layers.0.{path}"].module_class for path in FUSED} == {"BasicLinear"}
    assert sum(gemm.quantized for gemm in observed.gemms) == 3 * len(gpt.LINEARS)


def test_before_the_first_step_nothing_has_run():
    recipe = recipes.load("mxfp8")
    model, _ = build(recipe)
    rows = {row.module: row for row in manifest(model).rows}
    assert {rows[f"decoder.layers.0.{path}"].reason_code for path in FUSED} == {"no_forward"}


def test_a_model_in_bf16_says_so():
    model, config = build(None)
    with inject(recipes.load("bf16"), config=config):
        gpt.train_step(model)
    rows = {row.module: row for row in manifest(model).rows}
    assert {rows[f"decoder.layers.0.{path}"].reason_code for path in FUSED} == {"outside_context"}


def test_a_recipe_takes_over_and_delayed_scaling_comes_back():
    delayed = recipes.load("delayed")
    model, config = build(delayed)
    with inject(delayed, config=config) as injection:
        gpt.train_step(model)
        for recipe in (recipes.load("mxfp8"), recipes.load("tensorwise"), delayed):
            switch(injection, model, recipe)
            for seed in range(3):
                gpt.train_step(model, seed=seed)
            require_quantized(manifest(model, recipe), recipe)
    linear = next(one for one in linears(model) if one.path.endswith("linear_fc1"))
    scales = {tensor: scale[column].item() for tensor, scale, column in linear.scale_columns()}
    assert scales.keys() == {"input", "weight", "grad_output"}
    assert 1.0 not in scales.values()


def test_options_of_the_same_recipe_take_effect():
    recipe = recipes.load("tensorwise")
    model, config = build(recipe)
    with inject(recipe, config=config) as injection:
        gpt.train_step(model)
        other = recipes.load("tensorwise", use_power_2_scales=True)
        switch(injection, model, other)
        gpt.train_step(model)
    require_quantized(manifest(model, other), other)


@pytest.mark.parametrize("name", FP8)
def test_telemetry_sees_every_operand_of_the_operations(name):
    recipe = recipes.load(name)
    model, config = build(recipe)
    observer = Observer(model, history=False)
    with inject(recipe, config=config):
        for step in range(2):
            observer.begin(stats=True)
            gpt.train_step(model, seed=step)
            reading = observer.end()
    assert reading is not None
    elements = {(spec.module, spec.tensor) for spec in reading.specs if spec.name == "elements"}
    measured = {name for name, _ in MEASURED}
    kept = {(spec.module, spec.tensor) for spec in reading.specs if spec.name not in measured}
    every = {
        (f"decoder.layers.0.{path}", tensor)
        for path in gpt.LINEARS
        for tensor in ("input", "weight", "grad_output")
    }
    assert elements == every
    assert kept == every
    assert not [spec for spec in reading.specs if spec.name == "unobserved"]


def plain(*, bias=False):
    import transformer_engine.pytorch as te

    return te.ops.Sequential(
        te.ops.LayerNorm(128, dtype=torch.bfloat16),
        te.ops.Linear(128, 256, bias=bias, dtype=torch.bfloat16),
        te.ops.GELU(),
        te.ops.BasicLinear(256, 128, dtype=torch.bfloat16),
    )


def plain_step(model, recipe, *, seed=0):
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(seed)).bfloat16().requires_grad_()
    with autocast(recipe):
        y = model(x)
    y.float().square().mean().backward()


@pytest.mark.parametrize("name", FP8)
def test_operations_of_plain_transformer_engine_have_rows(name):
    recipe = recipes.load(name)
    model = plain()
    assert {row.reason_code for row in manifest(model).rows} == {"no_fp8_forward"}
    observer = Observer(model, history=False)
    observer.begin(stats=True)
    plain_step(model, recipe)
    reading = observer.end()
    found = manifest(model, recipe)
    require_quantized(found, recipe)
    assert [row.module for row in found.rows] == ["1", "3"]
    assert reading is not None
    assert {(spec.module, spec.tensor) for spec in reading.specs if spec.name == "elements"} == {
        (path, tensor) for path in ("1", "3") for tensor in ("input", "weight", "grad_output")
    }


ACTIVATIONS = [
    *("GELU", "QGELU", "ReLU", "SReLU", "SiLU"),
    *("GLU", "GEGLU", "QGEGLU", "ReGLU", "SReGLU", "SwiGLU"),
    pytest.param("ClampedSwiGLU", marks=since("2.14")),
    pytest.param("SiTUGLU", marks=since("2.20")),
]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_what_an_activation_quantises_is_seen(name):
    import transformer_engine.pytorch as te

    features = 256 if name.endswith("GLU") else 128
    model = te.ops.Sequential(
        te.ops.BasicLinear(128, features, dtype=torch.bfloat16),
        getattr(te.ops, name)(),
        te.ops.BasicLinear(128, 128, dtype=torch.bfloat16),
    )
    observer = Observer(model, history=False)
    observer.begin(stats=True)
    plain_step(model, recipes.load("mxfp8"))
    reading = observer.end()
    assert reading is not None
    assert not [spec for spec in reading.specs if spec.name == "unobserved"]
    assert {(spec.module, spec.tensor) for spec in reading.specs if spec.name == "elements"} == {
        (path, tensor) for path in ("0", "2") for tensor in ("input", "weight", "grad_output")
    }


def test_a_gradient_that_a_kept_function_quantises_is_marked():
    recipe = recipes.load("mxfp8")
    model = plain(bias=True)
    plain_step(model, recipe)  # here the operations of the backward pass are fused
    observer = Observer(model, history=False)
    observer.begin()
    plain_step(model, recipe)
    reading = observer.end()
    assert reading is not None
    assert {(spec.module, spec.tensor) for spec in reading.specs if spec.name == "unobserved"} == {
        ("1", "grad_output")
    }


def test_a_plain_recipe_changes_with_all_its_options():
    model = plain()
    plain_step(model, recipes.load("delayed"))
    for recipe in (
        recipes.load("tensorwise"),
        recipes.load("tensorwise", use_power_2_scales=True),
        recipes.load("delayed", amax_history_len=4),
    ):
        reset_quantization_state(model)
        for seed in range(3):
            plain_step(model, recipe, seed=seed)
        require_quantized(manifest(model, recipe), recipe)
    scales = [scale[column].item() for one in linears(model) for _, scale, column in one.scale_columns()]
    assert len(scales) == 6
    assert 1.0 not in scales


def test_what_is_read_of_an_operation_can_be_copied():
    one = linears(plain())[0]
    copied = copy.copy(one.module)
    assert type(copied) is type(one.module)
    assert copied.module is one.module.module


def test_a_weight_that_is_stored_quantised_keeps_its_recipe():
    import transformer_engine.pytorch as te

    recipe = recipes.load("tensorwise")
    with te.quantized_model_init(recipe=recipe.te()):
        model = te.ops.Sequential(te.ops.Linear(128, 128, dtype=torch.bfloat16))
    plain_step(model, recipe)
    require_quantized(manifest(model, recipe), recipe)
    with pytest.raises(InjectionError, match="stored quantised"):
        reset_quantization_state(model)
