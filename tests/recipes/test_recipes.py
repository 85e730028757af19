"""What each recipe means, what it refuses, and that it survives a round trip."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from nemo_fp8_recipes import recipes
from nemo_fp8_recipes.errors import RecipeError
from nemo_fp8_recipes.recipes import Delayed, MMParams, OperandPlan, QParams, Tensorwise
from tests.support.processes import run_python


def plan(format: str, scaling: str, block, dtype: str, power_of_two: bool) -> OperandPlan:
    return OperandPlan(
        format=format, scaling=scaling, block=block, scale_dtype=dtype, power_of_two=power_of_two
    )


# The recipes as their own documents describe them, written down independently of the code.
OPERANDS = {
    "bf16": {},
    "delayed": {
        "input": plan("e4m3", "delayed", None, "fp32", False),
        "weight": plan("e4m3", "delayed", None, "fp32", False),
        "grad_output": plan("e5m2", "delayed", None, "fp32", False),
    },
    "tensorwise": {
        "input": plan("e4m3", "tensorwise", None, "fp32", False),
        "weight": plan("e4m3", "tensorwise", None, "fp32", False),
        "grad_output": plan("e5m2", "tensorwise", None, "fp32", False),
    },
    "mxfp8": {
        "input": plan("e4m3", "block", (1, 32), "e8m0", True),
        "weight": plan("e4m3", "block", (1, 32), "e8m0", True),
        "grad_output": plan("e4m3", "block", (1, 32), "e8m0", True),
    },
    "blockwise": {
        "input": plan("e4m3", "block", (1, 128), "fp32", True),
        "weight": plan("e4m3", "block", (128, 128), "fp32", True),
        "grad_output": plan("e4m3", "block", (1, 128), "fp32", True),
    },
    "nvfp4": {
        "input": plan("e2m1", "block", (1, 16), "e4m3", False),
        "weight": plan("e2m1", "block", (16, 16), "e4m3", False),
        "grad_output": plan("e2m1", "block", (1, 16), "e4m3", False),
    },
}


@pytest.mark.parametrize("name", OPERANDS)
def test_operands_of_the_defaults(name):
    assert recipes.load(name).operands() == OPERANDS[name]


def test_the_names_are_the_six():
    assert set(recipes.names()) == set(OPERANDS)


@pytest.mark.parametrize(
    ("name", "options", "operand", "changes"),
    [
        ("mxfp8", {"fp8_format": "hybrid"}, "grad_output", {"format": "e5m2"}),
        ("mxfp8", {"fp8_format": "hybrid"}, "input", {}),
        ("mxfp8", {"enable_2d_quantization": True}, "weight", {"block": (32, 32)}),
        ("mxfp8", {"enable_2d_quantization": True}, "input", {}),
        ("delayed", {"fp8_format": "e4m3"}, "grad_output", {"format": "e4m3"}),
        ("tensorwise", {"use_power_2_scales": True}, "weight", {"power_of_two": True}),
        ("tensorwise", {"fp8_quant_fwd_inp": {"power_2_scale": True}}, "input", {"power_of_two": True}),
        ("tensorwise", {"fp8_quant_fwd_inp": {"power_2_scale": True}}, "weight", {}),
        ("blockwise", {"use_f32_scales": True}, "grad_output", {"power_of_two": False}),
        ("blockwise", {"w_block_scaling_dim": 1}, "weight", {"block": (1, 128)}),
        (
            "blockwise",
            {"w_block_scaling_dim": 1, "grad_block_scaling_dim": 2},
            "grad_output",
            {"block": (128, 128)},
        ),
        ("nvfp4", {"disable_2d_quantization": True}, "weight", {"block": (1, 16)}),
    ],
)
def test_an_option_changes_its_operand_only(name, options, operand, changes):
    expected = dataclasses.replace(OPERANDS[name][operand], **changes)
    assert recipes.load(name, **options).operands()[operand] == expected


def test_backward_override_leaves_gradients_unquantised():
    assert set(recipes.load("mxfp8", backward_override="high_precision").operands()) == {"input", "weight"}


@pytest.mark.parametrize("name", OPERANDS)
def test_round_trip_through_a_mapping_and_omegaconf(name):
    recipe = recipes.load(name)
    assert recipes.load(recipe.to_dict()) == recipe
    assert recipes.load(OmegaConf.create(recipe.to_dict())) == recipe
    assert recipe.to_dict()["schema_version"] == 1


def test_load_takes_a_recipe_with_overrides_and_keeps_the_rest():
    recipe = recipes.load("tensorwise", amax_epsilon=1e-6)
    changed = recipes.load(recipe, fp8_gemm_fprop={"use_split_accumulator": True})
    assert isinstance(changed, Tensorwise)
    assert changed.amax_epsilon == 1e-6
    assert changed.fp8_gemm_fprop == MMParams(use_split_accumulator=True)
    assert recipe.fp8_gemm_fprop == MMParams(use_split_accumulator=False)


def test_a_partial_nested_option_keeps_the_fields_own_default():
    # MMParams alone defaults to True, tensorwise's forward GEMM to False.
    assert recipes.load("tensorwise", fp8_gemm_fprop={}).fp8_gemm_fprop.use_split_accumulator is False


@given(st.booleans(), st.floats(0, 1), st.none() | st.booleans(), st.none() | st.floats(0, 1))
def test_operand_parameters_follow_the_recipe_where_null(power, epsilon, own_power, own_epsilon):
    recipe = Tensorwise(
        use_power_2_scales=power,
        amax_epsilon=epsilon,
        fp8_quant_fwd_weight=QParams(power_2_scale=own_power, amax_epsilon=own_epsilon),
    )
    quantization = recipe.quantization()
    assert quantization["input"] == QParams(power_2_scale=power, amax_epsilon=epsilon)
    assert quantization["weight"] == QParams(
        power_2_scale=power if own_power is None else own_power,
        amax_epsilon=epsilon if own_epsilon is None else own_epsilon,
    )


REFUSED = [
    ("mxfp8", {"margin": 1}, "fp8_recipe.margin", "no kernel reads it"),
    ("mxfp8", {"tp_only_amax_red": True}, "fp8_recipe.tp_only_amax_red", "change nothing"),
    ("delayed", {"fp8_wgrad": False}, "fp8_recipe.fp8_wgrad", "drops"),
    (
        "delayed",
        {"num_layers_at_start_in_bf16": 1},
        "fp8_recipe.num_layers_at_start_in_bf16",
        "around all layers",
    ),
    (
        "delayed",
        {"num_layers_at_end_in_bf16": 2},
        "fp8_recipe.num_layers_at_end_in_bf16",
        "around all layers",
    ),
    ("delayed", {"backward_override": "dequantized"}, "fp8_recipe.backward_override", "FP8 only"),
    ("delayed", {"amax_history_len": 0}, "fp8_recipe.amax_history_len", ">= 1"),
    ("delayed", {"margin": -1}, "fp8_recipe.margin", "saturate"),
    ("delayed", {"margin": 18}, "fp8_recipe.margin", "zero"),
    ("delayed", {"margin": 10**30}, "fp8_recipe.margin", "64 bits"),
    ("delayed", {"amax_compute_algo": "most_recnt"}, "fp8_recipe.amax_compute_algo", "most_recent"),
    (
        "delayed",
        {"scaling_factor_compute_algo": "mine"},
        "fp8_recipe.scaling_factor_compute_algo",
        "module:function",
    ),
    (
        "delayed",
        {"reduce_amax": False, "tp_only_amax_red": True},
        "fp8_recipe.tp_only_amax_red",
        "reduce_amax",
    ),
    ("tensorwise", {"amax_epsilon": -1.0}, "fp8_recipe.amax_epsilon", ">= 0"),
    ("tensorwise", {"amax_epsilon": float("nan")}, "fp8_recipe.amax_epsilon", "finite"),
    ("tensorwise", {"tp_only_amax_red": True}, "fp8_recipe.tp_only_amax_red", "fp8_dpa"),
    ("tensorwise", {"num_layers_at_end_in_bf16": -1}, "fp8_recipe.num_layers_at_end_in_bf16", ">= 0"),
    ("tensorwise", {"fp8_mha": True}, "fp8_recipe.fp8_mha", "fp8_dpa"),
    ("blockwise", {"x_block_scaling_dim": 2}, "fp8_recipe.x_block_scaling_dim", "w_block_scaling_dim"),
    ("blockwise", {"grad_block_scaling_dim": 2}, "fp8_recipe.w_block_scaling_dim", "grad_block_scaling_dim"),
    ("blockwise", {"w_block_scaling_dim": 3}, "fp8_recipe.w_block_scaling_dim", "128x128"),
    ("blockwise", {"fp8_dpa": True}, "fp8_recipe.fp8_dpa", "attention"),
    ("blockwise", {"fp8_gemm_dgrad": {"use_split_accumulator": False}}, "fp8_recipe.fp8_gemm_dgrad", "split"),
    ("nvfp4", {"nvfp4_4over6": "all"}, "fp8_recipe.nvfp4_4over6", "Hadamard"),
    ("nvfp4", {"nvfp4_4over6_err_mode": "MSE"}, "fp8_recipe.nvfp4_4over6_err_mode", "change nothing"),
    ("nvfp4", {"row_scaled_activation": True}, "fp8_recipe.row_scaled_activation", "Hadamard"),
    ("nvfp4", {"fp8_format": "hybrid"}, "fp8_recipe.fp8_format", "e4m3"),
    ("mxfp8", {"fp8_format": "e5m2"}, "fp8_recipe.fp8_format", "hybrid"),
    ("delayed", {"amax_history_len": "16"}, "fp8_recipe.amax_history_len", "an integer"),
    ("delayed", {"amax_history_len": 16.0}, "fp8_recipe.amax_history_len", "an integer"),
    ("delayed", {"amax_history_len": True}, "fp8_recipe.amax_history_len", "an integer"),
    ("delayed", {"reduce_amax": 1}, "fp8_recipe.reduce_amax", "true or false"),
    ("delayed", {"amax_histroy_len": 16}, "fp8_recipe.amax_histroy_len", "Did you mean 'amax_history_len'?"),
    ("mxfp8", {"amax_history_len": 16}, "fp8_recipe.amax_history_len", "option of delayed"),
    ("bf16", {"nonsense": 16}, "fp8_recipe.nonsense", "has no options"),
    (
        "tensorwise",
        {"fp8_quant_fwd_inp": {"epsilon": 1}},
        "fp8_recipe.fp8_quant_fwd_inp.epsilon",
        "amax_epsilon",
    ),
    ("tensorwise", {"fp8_quant_fwd_inp": 3}, "fp8_recipe.fp8_quant_fwd_inp", "a mapping"),
]


@pytest.mark.parametrize(("name", "options", "key", "said"), REFUSED)
def test_refused_by_name_with_the_reason(name, options, key, said):
    with pytest.raises(RecipeError) as caught:
        recipes.load(name, **options)
    assert caught.value.key == key
    assert said in str(caught.value)


def test_the_constructor_refuses_what_load_refuses():
    with pytest.raises(RecipeError, match="amax_history_len"):
        Delayed(amax_history_len="16")  # type: ignore[arg-type]  # on purpose
    with pytest.raises(RecipeError, match="Did you mean 'hybrid'"):
        Delayed(fp8_format="hybryd")  # type: ignore[arg-type]  # on purpose


def test_formats_in_tes_own_spelling():
    assert recipes.load("mxfp8", fp8_format="HYBRID").fp8_format == "hybrid"


@pytest.mark.parametrize(
    "source", [None, 3, ["mxfp8"], {"fp8_format": "e4m3"}, {"name": "mxfp8", "schema_version": 2}]
)
def test_what_is_no_recipe(source):
    with pytest.raises(RecipeError):
        recipes.load(source)


def test_every_option_knows_its_history():
    for recipe in recipes.RECIPES.values():
        for field in dataclasses.fields(recipe):
            assert set(field.metadata) == {"since", "te", "megatron", "ignored"}, field.name


def test_recipes_import_neither_torch_nor_te():
    run_python(
        """
        import sys
        import nemo_fp8_recipes
        nemo_fp8_recipes.load("mxfp8").megatron()
        assert not {"torch", "transformer_engine", "megatron", "numpy"} & set(sys.modules)
        """
    )
