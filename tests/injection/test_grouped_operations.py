"""Grouped linear layers that run as operations of Transformer Engine: alone, and in the MLPs that Megatron
0.19 makes of them. Under an older Megatron a class like its own stands in for one of the two.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn.functional import silu

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
from nemo_fp8_recipes.telemetry.linears import linears
from nemo_fp8_recipes.telemetry.observer import Observer
from tests.support.te_release import since

from . import gpt

pytestmark = [pytest.mark.usefixtures("megatron"), since("2.20")]

FP8 = ["delayed", "tensorwise", "mxfp8", "nvfp4", "blockwise"]
ON_GROUPED_TENSORS = ("tensorwise", "mxfp8", "nvfp4")
"""Recipes that quantise all experts at once on the device that the tests pose as."""
TENSORS = ("input", "weight", "grad_output")
EXPERTS, TOKENS = 3, [128, 0, 256]


def plain(**options):
    import transformer_engine.pytorch as te

    options = {"bias": False, "dtype": torch.bfloat16, **options}
    return te.ops.Sequential(
        te.ops.GroupedLinear(EXPERTS, 128, 256, **options), te.ops.GroupedLinear(EXPERTS, 256, 128, **options)
    )


def plain_step(model, recipe, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(TOKENS), 128, generator=generator).bfloat16().requires_grad_()
    splits = torch.tensor(TOKENS)
    with autocast(recipe):
        y = model(x, splits, splits)
    y.float().square().mean().backward()


def observed(reading, name):
    return {(spec.module, spec.tensor) for spec in reading.specs if spec.name == name}


@pytest.mark.parametrize("name", FP8)
def test_every_expert_is_read(name):
    recipe = recipes.load(name)
    model = plain()
    assert {row.reason_code for row in manifest(model).rows} == {"no_fp8_forward"}
    assert [linear.path for linear in linears(model)] == [
        f"{path}.gemm{expert}" for path in ("0", "1") for expert in range(EXPERTS)
    ]
    observer = Observer(model, history=False)
    observer.begin(stats=True)
    plain_step(model, recipe)
    reading = observer.end()
    found = manifest(model, recipe)
    require_quantized(found, recipe)
    assert [(row.module, row.module_class) for row in found.rows] == [
        ("0", "GroupedLinear"),
        ("1", "GroupedLinear"),
    ]
    assert reading is not None
    elements = observed(reading, "elements")
    assert {path for path, tensor in elements if tensor == "weight"} == {
        linear.path for linear in linears(model)
    }
    assert not observed(reading, "unobserved")
    if name in ON_GROUPED_TENSORS:
        assert {(path, tensor) for path, tensor in elements if tensor != "weight"} == {
            (path, tensor) for path in ("0", "1") for tensor in ("input", "grad_output")
        }


@pytest.mark.parametrize("name", ["delayed", "blockwise"])
def test_experts_that_are_quantised_one_by_one_have_every_row(name):
    model = plain()
    observer = Observer(model, history=False)
    observer.begin(stats=True)
    plain_step(model, recipes.load(name))
    reading = observer.end()
    assert reading is not None
    with_tokens = [linear.path for linear in linears(model) if not linear.path.endswith("gemm1")]
    everything = {(path, tensor) for path in with_tokens for tensor in TENSORS}
    everything |= {(f"{path}.gemm1", "weight") for path in ("0", "1")}
    assert observed(reading, "elements") == everything
    assert not observed(reading, "unobserved")


def test_a_recipe_changes_with_all_its_options():
    model = plain()
    plain_step(model, recipes.load("delayed"))
    for recipe in (
        recipes.load("mxfp8"),
        recipes.load("tensorwise", use_power_2_scales=True),
        recipes.load("delayed", amax_history_len=4),
    ):
        reset_quantization_state(model)
        for seed in range(3):
            plain_step(model, recipe, seed=seed)
        require_quantized(manifest(model, recipe), recipe)
    scales = {
        (one.path, tensor): scale[column].item()
        for one in linears(model)
        for tensor, scale, column in one.scale_columns()
    }
    assert len(scales) == 2 * EXPERTS * len(TENSORS)
    assert {key for key, scale in scales.items() if scale == 1.0} <= {
        (f"{path}.gemm1", tensor) for path in ("0", "1") for tensor in ("input", "grad_output")
    }


def test_the_scales_are_those_of_the_operands():
    """Delayed scaling keeps them by GEMM and operand, two forward and one backward."""
    model = plain()
    for seed in range(3):
        plain_step(model, recipes.load("delayed"), seed=seed)
    for linear in linears(model):
        quantizers = dict(linear.quantizers())
        for tensor, scale, column in linear.scale_columns():
            assert quantizers[tensor].scale.data_ptr() == scale[column].data_ptr()


@pytest.mark.parametrize("options", [{}, {"single_grouped_weight": True}])
def test_weights_that_are_stored_quantised_keep_their_recipe(options, monkeypatch):
    import transformer_engine.pytorch as te

    monkeypatch.setenv("NVTE_GROUPED_LINEAR_SINGLE_PARAM", "1")
    recipe = recipes.load("mxfp8")
    with te.quantized_model_init(recipe=recipe.te()):
        model = plain(**options)
    plain_step(model, recipe)
    require_quantized(manifest(model, recipe), recipe)
    with pytest.raises(InjectionError, match="stored quantised"):
        reset_quantization_state(model)


@pytest.fixture
def longer(monkeypatch):
    """As many tokens as the kernels of groups want: a multiple of 128."""
    monkeypatch.setattr(gpt, "SEQUENCE", 64)


def like_megatrons():
    """A class in the place of Megatron 0.19's, for an older one: its way to a recipe, without its norm."""
    import transformer_engine.pytorch as te
    from megatron.core.extensions import transformer_engine

    class TEFusedMLPWithGroupedLinear(transformer_engine.TEFusedMLP):
        def _make_fused_impl(self):
            made = te.ops.Sequential()
            for linear in (self.linear_fc1, self.linear_fc2):
                outputs, inputs = linear.weight.shape
                operation = te.ops.GroupedLinear(1, inputs, outputs, bias=False, device="meta")
                operation.weight0 = linear.weight
                made.append(operation)
            made.insert(1, te.ops.ScaledSwiGLU())
            return made

        def forward(self, hidden_states, **_kwargs):
            from transformer_engine.common.recipe import MXFP8BlockScaling

            if not hasattr(self, "_recipe"):
                self._recipe = MXFP8BlockScaling()
            if self._fused_impl is None:
                self._fused_impl = (self._make_fused_impl(),)
            flat = hidden_states.reshape(-1, hidden_states.shape[-1])
            splits, scales = torch.tensor([len(flat)]), flat.new_ones(len(flat))
            with te.autocast(enabled=True, recipe=self._recipe):
                out = self._fused_impl[0](flat, splits, scales, splits)
            return out.view(hidden_states.shape), None

    return TEFusedMLPWithGroupedLinear


@pytest.fixture
def dense(longer, monkeypatch):
    """Builds a model whose MLP is of grouped operations."""
    from megatron.core.extensions import transformer_engine
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    theirs = getattr(transformer_engine, "TEFusedMLPWithGroupedLinear", None)
    if theirs is None:
        monkeypatch.setattr(
            transformer_engine, "TEFusedMLPWithGroupedLinear", like_megatrons(), raising=False
        )

    def build(recipe):
        config = gpt.config_of(recipe, layers=1, activation_func=silu, gated_linear_unit=True)
        spec = get_gpt_layer_with_transformer_engine_spec(use_te_op_fuser=True)
        mlp = spec.submodules.mlp
        if theirs is not None:
            spec.submodules.mlp = functools.partial(
                theirs.as_mlp_submodule, submodules=mlp.keywords["submodules"]
            )
        else:
            mlp.module = transformer_engine.TEFusedMLPWithGroupedLinear
        return gpt.build(config, spec=spec), config

    return build


FUSED = ("decoder.layers.0.mlp.linear_fc1", "decoder.layers.0.mlp.linear_fc2")


@pytest.mark.parametrize("name", FP8)
def test_the_mlp_gets_the_injected_recipe(dense, name):
    recipe = recipes.load(name)
    model, config = dense(recipe)
    rows = {row.module: row for row in manifest(model).rows}
    assert {rows[path].reason_code for path in FUSED} == {"no_forward"}
    observer = Observer(model, history=False)
    with inject(recipe, config=config):
        for step in range(2):
            observer.begin(stats=True)
            gpt.train_step(model, seed=step)
            reading = observer.end()
    found = manifest(model, recipe)
    require_quantized(found, recipe)
    rows = {row.module: row for row in found.rows}
    assert {rows[path].module_class for path in FUSED} == {"GroupedLinear"}
    assert reading is not None
    assert {(path, tensor) for path in FUSED for tensor in TENSORS} <= observed(reading, "elements")
    assert not observed(reading, "unobserved")


def test_options_and_recipes_change(dense):
    recipe = recipes.load("delayed")
    model, config = dense(recipe)
    with inject(recipe, config=config) as injection:
        gpt.train_step(model)
        for other in (
            recipes.load("mxfp8"),
            recipes.load("mxfp8", fp8_format="hybrid"),
            recipes.load("tensorwise", use_power_2_scales=True),
            recipe,
        ):
            switch(injection, model, other)
            gpt.train_step(model)
            require_quantized(manifest(model, other), other)


def test_the_mlp_cannot_train_in_bf16(dense):
    model, config = dense(None)
    with (
        inject(recipes.load("bf16"), config=config),
        pytest.raises(InjectionError, match="quantises in every forward pass"),
    ):
        gpt.train_step(model)


def test_without_injection_the_mlp_has_its_own_recipe_again(dense):
    from megatron.core.extensions.transformer_engine import TEFusedMLPWithGroupedLinear

    recipe = recipes.load("mxfp8", fp8_format="hybrid")
    model, config = dense(recipe)
    with inject(recipe, config=config):
        gpt.train_step(model)
        assert hasattr(TEFusedMLPWithGroupedLinear, "_recipe")
    assert not hasattr(TEFusedMLPWithGroupedLinear, "_recipe")
    gpt.train_step(model)
    assert type(model.decoder.layers[0].mlp._recipe).__name__ == "MXFP8BlockScaling"


@pytest.mark.parametrize("name", FP8)
def test_experts_of_megatrons_fused_mlp(longer, monkeypatch, name):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.transformer.moe import experts

    if not hasattr(experts.TEGroupedMLP, "_make_fused_ops"):
        pytest.skip("Megatron-Core 0.19 or later makes experts of operations")
    monkeypatch.setenv("NVTE_CUTEDSL_FUSED_GROUPED_MLP", "1")
    recipe = recipes.load(name)
    config = gpt.config_of(
        recipe,
        layers=1,
        activation_func=silu,
        gated_linear_unit=True,
        use_transformer_engine_op_fuser=True,
        num_moe_experts=4,
        moe_router_topk=2,
        moe_router_dtype="fp32",
        moe_grouped_gemm=True,
        moe_ffn_hidden_size=256,
        moe_token_dispatcher_type="alltoall",
    )
    spec = get_gpt_layer_with_transformer_engine_spec(num_experts=4, moe_grouped_gemm=True)
    model = gpt.build(config, spec=spec)
    paths = [f"decoder.layers.0.mlp.experts.linear_fc{number}" for number in (1, 2)]
    other = recipes.load("tensorwise" if name != "tensorwise" else "mxfp8")
    with inject(recipe, config=config) as injection:
        gpt.train_step(model)
        found = manifest(model, recipe)
        require_quantized(found, recipe)
        rows = {row.module: row for row in found.rows}
        assert {rows[path].module_class for path in paths} == {"GroupedLinear"}
        observer = Observer(model, history=False)
        observer.begin(stats=True)
        gpt.train_step(model)
        reading = observer.end()
        assert reading is not None
        weights = {(f"{path}.gemm{expert}", "weight") for path in paths for expert in range(4)}
        assert weights <= observed(reading, "elements")
        assert not observed(reading, "unobserved")
        switch(injection, model, other)
        gpt.train_step(model)
        require_quantized(manifest(model, other), other)
