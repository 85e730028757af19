"""Flags, environment and factories for Megatron-LM: every option of every recipe arrives, or is refused by
name.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_fp8_recipes import recipes
from nemo_fp8_recipes.errors import ConfigError, Fp8Error, RecipeError
from nemo_fp8_recipes.recipes import MMParams, QParams
from nemo_fp8_recipes.recipes.modules import ModuleRecipe
from nemo_fp8_recipes.targets import megatron_lm, transformer_engine
from nemo_fp8_recipes.targets.megatron_lm.options import carrier
from tests.injection import gpt
from tests.support.te_release import since, skip_unknown

FLAG, VARIABLE, FACTORY, INJECTION, REFUSED, ONLY_DEFAULT = (
    "flag",
    "variable",
    "factory",
    "injection",
    "nothing",
    "fixed",
)

EVERYWHERE: dict[str, tuple[list[dict[str, Any]], str]] = {
    "fp8_dpa": ([{"fp8_dpa": True}], INJECTION),
    "fp8_mha": ([{"fp8_mha": True, "fp8_dpa": True}], INJECTION),
    "backward_override": (
        [{"backward_override": "high_precision"}, {"backward_override": "dequantized"}],
        VARIABLE,
    ),
    "num_layers_at_start_in_bf16": ([{"num_layers_at_start_in_bf16": 2}], FLAG),
    "num_layers_at_end_in_bf16": ([{"num_layers_at_end_in_bf16": 1}], FLAG),
    "fp8_param": ([{"fp8_param": True}], FLAG),
    "tp_only_amax_red": ([{"tp_only_amax_red": True, "fp8_dpa": True}], REFUSED),
    "fp8_format": ([{"fp8_format": "hybrid"}, {"fp8_format": "e4m3"}], FLAG),
}
QPARAMS = [QParams(power_2_scale=True, amax_epsilon=0.5), QParams(amax_epsilon=1e-6)]
FAST = MMParams(use_split_accumulator=False)
SPLIT = MMParams(use_split_accumulator=True)

# Recipe -> option -> values other than the default, with what they need beside them, and what carries them.
CASES: dict[str, dict[str, tuple[list[dict[str, Any]], str]]] = {
    "bf16": {},
    "delayed": EVERYWHERE
    | {
        "margin": ([{"margin": 2}], FLAG),
        "amax_history_len": ([{"amax_history_len": 16}], FLAG),
        "amax_compute_algo": ([{"amax_compute_algo": "most_recent"}], FLAG),
        "scaling_factor_compute_algo": ([{"scaling_factor_compute_algo": "math:sqrt"}], INJECTION),
        "reduce_amax": ([{"reduce_amax": False}], INJECTION),
        "backward_override": ([{"backward_override": "dequantized"}], ONLY_DEFAULT),
        "num_layers_at_start_in_bf16": ([{"num_layers_at_start_in_bf16": 2}], ONLY_DEFAULT),
        "num_layers_at_end_in_bf16": ([{"num_layers_at_end_in_bf16": 2}], ONLY_DEFAULT),
        "tp_only_amax_red": ([{"tp_only_amax_red": True}], REFUSED),
        "fp8_wgrad": ([{"fp8_wgrad": False}], ONLY_DEFAULT),
    },
    "tensorwise": EVERYWHERE
    | {
        "use_power_2_scales": ([{"use_power_2_scales": True}], VARIABLE),
        "amax_epsilon": ([{"amax_epsilon": 0.25}], FACTORY),
        "fp8_quant_fwd_inp": ([{"fp8_quant_fwd_inp": value} for value in QPARAMS], FACTORY),
        "fp8_quant_fwd_weight": ([{"fp8_quant_fwd_weight": value} for value in QPARAMS], FACTORY),
        "fp8_quant_bwd_grad": ([{"fp8_quant_bwd_grad": value} for value in QPARAMS], FACTORY),
        "fp8_gemm_fprop": ([{"fp8_gemm_fprop": SPLIT}], INJECTION),
        "fp8_gemm_dgrad": ([{"fp8_gemm_dgrad": FAST}], INJECTION),
        "fp8_gemm_wgrad": ([{"fp8_gemm_wgrad": FAST}], INJECTION),
    },
    "blockwise": EVERYWHERE
    | {
        "fp8_dpa": ([{"fp8_dpa": True}], ONLY_DEFAULT),
        "fp8_mha": ([{"fp8_mha": True}], ONLY_DEFAULT),
        "tp_only_amax_red": ([{"tp_only_amax_red": True}], ONLY_DEFAULT),
        "use_f32_scales": ([{"use_f32_scales": True}], VARIABLE),
        "amax_epsilon": ([{"amax_epsilon": 0.25}], FACTORY),
        "x_block_scaling_dim": ([{"x_block_scaling_dim": 2, "w_block_scaling_dim": 1}], FACTORY),
        "w_block_scaling_dim": ([{"w_block_scaling_dim": 1}], FACTORY),
        "grad_block_scaling_dim": ([{"grad_block_scaling_dim": 2, "w_block_scaling_dim": 1}], FACTORY),
        "fp8_quant_fwd_inp": ([{"fp8_quant_fwd_inp": QParams(amax_epsilon=0.5)}], FACTORY),
        "fp8_quant_fwd_weight": ([{"fp8_quant_fwd_weight": QParams(amax_epsilon=0.5)}], FACTORY),
        "fp8_quant_bwd_grad": ([{"fp8_quant_bwd_grad": QParams(power_2_scale=False)}], FACTORY),
        "fp8_gemm_fprop": ([{"fp8_gemm_fprop": FAST}], ONLY_DEFAULT),
        "fp8_gemm_dgrad": ([{"fp8_gemm_dgrad": FAST}], ONLY_DEFAULT),
        "fp8_gemm_wgrad": ([{"fp8_gemm_wgrad": FAST}], ONLY_DEFAULT),
    },
    "mxfp8": EVERYWHERE
    | {
        "margin": ([{"margin": 1}], ONLY_DEFAULT),
        "tp_only_amax_red": ([{"tp_only_amax_red": True}], ONLY_DEFAULT),
        "enable_2d_quantization": ([{"enable_2d_quantization": True}], FACTORY),
    },
    "nvfp4": EVERYWHERE
    | {
        "fp8_format": ([{"fp8_format": "hybrid"}], ONLY_DEFAULT),
        "fp4_format": ([{"fp4_format": "e4m3"}], ONLY_DEFAULT),
        "tp_only_amax_red": ([{"tp_only_amax_red": True}], ONLY_DEFAULT),
        "disable_rht": ([{"disable_rht": True}], VARIABLE),
        "disable_stochastic_rounding": ([{"disable_stochastic_rounding": True}], VARIABLE),
        "disable_2d_quantization": ([{"disable_2d_quantization": True}], VARIABLE),
        "row_scaled_activation": ([{"row_scaled_activation": True, "disable_rht": True}], VARIABLE),
        "nvfp4_4over6": ([{"nvfp4_4over6": "weights"}], VARIABLE),
        "nvfp4_4over6_e4m3_use_256": (
            [{"nvfp4_4over6_e4m3_use_256": "none", "nvfp4_4over6": "weights"}],
            VARIABLE,
        ),
        "nvfp4_4over6_err_mode": ([{"nvfp4_4over6_err_mode": "MSE", "nvfp4_4over6": "weights"}], VARIABLE),
    },
}
ALL = [
    pytest.param(name, option, values, by, id=f"{name}-{option}-{number}")
    for name, options in CASES.items()
    for option, (samples, by) in options.items()
    for number, values in enumerate(samples)
]


def _options(name: str) -> set[str]:
    return {field.name for field in dataclasses.fields(recipes.load(name))}


def _parse(flags: tuple[str, ...]) -> dict[str, Any]:
    """Megatron-LM's own reading: what is not given has Megatron-Core's default."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag in ("fp8-format", "fp8-recipe", "fp4-format", "fp4-recipe", "transformer-impl"):
        parser.add_argument(f"--{flag}")
    for flag in ("fp8-quantizer-factory", "fp4-quantizer-factory"):
        parser.add_argument(f"--{flag}")
    parser.add_argument("--fp8-margin", type=int, default=0)
    parser.add_argument("--fp8-amax-history-len", type=int, default=1)
    parser.add_argument("--fp8-amax-compute-algo", choices=["most_recent", "max"], default="most_recent")
    parser.add_argument("--num-layers-at-start-in-bf16", type=int, default=1)
    parser.add_argument("--num-layers-at-end-in-bf16", type=int, default=1)
    for flag in (
        "bf16",
        "fp8-param-gather",
        "fp4-param-gather",
        "first-last-layers-bf16",
        "reuse-grad-buf-for-mxfp8-param-ag",
    ):
        parser.add_argument(f"--{flag}", action="store_true")
    return vars(parser.parse_args(flags))


def _te_recipes(environment: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> Any:
    """TE's recipe classes as a process with this environment imports them."""
    for name, value in environment.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    package = importlib.util.find_spec("transformer_engine")
    assert package is not None
    path = Path(next(iter(package.submodule_search_locations))) / "common" / "recipe" / "__init__.py"
    spec = importlib.util.spec_from_file_location("_te_recipes_of_megatron_lm", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def _as_megatron_builds_it(args: dict[str, Any], te: Any) -> Any:
    """megatron/core/fp8_utils.py: get_fp8_recipe, and fp4_utils.py: get_fp4_recipe."""
    if args["fp4_format"]:
        return te.NVFP4BlockScaling()
    form = te.Format[args["fp8_format"].upper()]
    match args["fp8_recipe"]:
        case "delayed":
            return te.DelayedScaling(
                fp8_format=form,
                margin=args["fp8_margin"],
                amax_history_len=args["fp8_amax_history_len"],
                amax_compute_algo=args["fp8_amax_compute_algo"],
            )
        case "tensorwise":
            return te.Float8CurrentScaling(fp8_format=form)
        case "blockwise":
            return te.Float8BlockScaling(fp8_format=form)
        case "mxfp8":
            return te.MXFP8BlockScaling(fp8_format=form)
    raise AssertionError(args["fp8_recipe"])


def _values(te_object: Any) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(te_object)}
    names |= {name for name in dir(te_object) if name.startswith(("fp8_quant_", "fp4_quant_"))}
    return {name: _comparable(getattr(te_object, name)) for name in names}


def _comparable(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return getattr(value, "name", value)


def _placement(recipe: recipes.Recipe) -> dict[str, Any]:
    fields = recipe.megatron()
    placed = fields["first_last_layers_bf16"]
    return {
        "first_last_layers_bf16": placed,
        "num_layers_at_start_in_bf16": fields["num_layers_at_start_in_bf16"] if placed else 1,
        "num_layers_at_end_in_bf16": fields["num_layers_at_end_in_bf16"] if placed else 1,
        "fp8_param_gather": fields.get("fp8_param", False),
        "fp4_param_gather": fields.get("fp4_param", False),
    }


@pytest.mark.parametrize("name", recipes.names())
def test_no_option_is_left_out_of_the_table(name: str) -> None:
    assert set(CASES[name]) == _options(name)


@pytest.mark.parametrize("name", [name for name in recipes.names() if name != "bf16"])
def test_a_plain_recipe_is_flags_and_variables(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # What a shell inherited must not decide.
    monkeypatch.setenv("NVTE_BACKWARD_OVERRIDE", "dequantized")
    monkeypatch.setenv("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "1")
    monkeypatch.setenv("NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES", "1")
    monkeypatch.setenv("NVTE_NVFP4_DISABLE_RHT", "1")
    recipe = recipes.load(name)
    made = megatron_lm.settings(recipe)
    assert made.route == "flags"
    args = _parse(made.flags)
    assert args["bf16"]
    assert {key: args[key] for key in _placement(recipe)} == _placement(recipe)
    te = _te_recipes(dict(made.environment), monkeypatch)
    expected = _values(transformer_engine._build(recipe, te))
    assert _values(_as_megatron_builds_it(args, te)) == expected


@pytest.mark.parametrize(("name", "option", "values", "by"), ALL)
def test_every_option_arrives_or_is_refused_by_name(
    name: str, option: str, values: dict[str, Any], by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = f"fp8_recipe.{option}"
    if by == ONLY_DEFAULT:
        with pytest.raises(RecipeError, match=option):
            recipes.load(name, **values)
        return
    recipe = recipes.load(name, **values)
    skip_unknown(recipe)
    if getattr(recipe, option) == getattr(recipes.load(name), option):
        assert option == "fp8_format"  # the other format of the two is the default
    assert carrier(recipe, option) == by
    if by in (INJECTION, REFUSED):
        others = {"fp8_dpa"} if option in ("fp8_mha", "tp_only_amax_red") else set()
        for route in ("flags", "factory", None):
            with pytest.raises(RecipeError) as caught:
                megatron_lm.settings(recipe, route=route)
            assert caught.value.key in {key, *(f"fp8_recipe.{other}" for other in others)}
        if by == REFUSED:
            with pytest.raises(RecipeError, match="tp_only_amax_red"):
                megatron_lm.settings(recipe, route="injection")
        else:
            injected = megatron_lm.settings(recipe, route="injection")
            assert megatron_lm.read(injected.environment) == recipe
            assert "custom" not in injected.flags
        return
    made = megatron_lm.settings(recipe)
    assert made.route == ("factory" if by == FACTORY else "flags")
    # The recipe that factories and hook read back is this one.
    assert megatron_lm.read(made.environment) == recipe
    args = _parse(made.flags)
    assert {key: args[key] for key in _placement(recipe)} == _placement(recipe)
    te = _te_recipes(dict(made.environment), monkeypatch)
    if by == FACTORY:
        assert args["fp8_recipe"] == "custom"
        assert args["fp8_format"] == recipe.megatron()["fp8"]
        path, _, attribute = args["fp8_quantizer_factory"].rpartition(".")
        assert callable(getattr(importlib.import_module(path), attribute))
        return
    expected = _values(transformer_engine._build(recipe, te))
    assert _values(_as_megatron_builds_it(args, te)) == expected


def test_bf16_is_asked_for_without_a_recipe() -> None:
    made = megatron_lm.settings(recipes.load("bf16"))
    assert made.flags == ("--bf16", "--transformer-impl", "transformer_engine")
    with pytest.raises(RecipeError, match="bf16"):
        megatron_lm.settings(recipes.load("bf16"), route="factory")


def test_mxfp8_primary_weights_come_with_the_flag_that_updates_them() -> None:
    made = megatron_lm.settings(recipes.load("mxfp8", fp8_param=True))
    assert "--reuse-grad-buf-for-mxfp8-param-ag" in made.flags
    assert any("--use-distributed-optimizer" in note for note in made.notes)


@pytest.mark.parametrize(
    ("recipe", "experts", "words"),
    [
        (recipes.load("delayed"), False, "--fp8-amax-history-len"),
        (recipes.load("tensorwise", amax_epsilon=0.5, fp8_param=True), False, "fp8_param"),
        (recipes.load("mxfp8", enable_2d_quantization=True), True, "16"),
    ],
)
def test_what_a_factory_cannot_do_is_refused(recipe: recipes.Recipe, experts: bool, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        megatron_lm.settings(recipe, route="factory", experts=experts)
    assert caught.value.hint


class TestVariable:
    def test_unset_is_an_error(self) -> None:
        with pytest.raises(RecipeError, match="NEMO_FP8_RECIPE is not set"):
            megatron_lm.read({})

    def test_a_name_or_alias_will_do(self) -> None:
        assert megatron_lm.read({"NEMO_FP8_RECIPE": "fp8_cs"}) == recipes.load("tensorwise")

    def test_broken_json_is_an_error(self) -> None:
        with pytest.raises(RecipeError, match="neither a recipe's name nor JSON"):
            megatron_lm.read({"NEMO_FP8_RECIPE": '{"name":"mxfp8"'})


class TestPrecisionConfig:
    def test_refusals(self) -> None:
        tensorwise = recipes.load("tensorwise")
        for text, words in (
            ("*fc1*", "GLOB=RECIPE"),
            ("=mxfp8", "empty"),
            ("*fc1*=delayed", "single modules"),
            ("*fc1*=nemotron_h", "num_layers_at_start_in_bf16"),
        ):
            with pytest.raises(ConfigError, match=words):
                megatron_lm.precision_config(tensorwise, [ModuleRecipe.parse(text)])
        with pytest.raises(RecipeError, match="mxfp9"):
            ModuleRecipe.parse("*fc1*=mxfp9")
        with pytest.raises(ConfigError, match="bf16 only"):
            megatron_lm.precision_config(recipes.load("delayed"), [ModuleRecipe("*", "mxfp8")])


@pytest.fixture(scope="module")
def megatron(emulated):
    with gpt.process_group():
        yield


def _trained(config: Any) -> Any:
    model = gpt.build(config)
    gpt.train_step(model)
    return model


@pytest.mark.usefixtures("megatron")
class TestInMegatron:
    """The installed Megatron-Core builds the recipe from what the flags say, on the emulated device."""

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("tensorwise", {}),
            (
                "tensorwise",
                {
                    "amax_epsilon": 0.125,
                    "fp8_quant_fwd_weight": {"power_2_scale": True},
                    "fp8_quant_bwd_grad": {"amax_epsilon": 0.5},
                },
            ),
            ("blockwise", {"w_block_scaling_dim": 1, "x_block_scaling_dim": 2, "amax_epsilon": 0.25}),
            ("blockwise", {"fp8_format": "hybrid", "fp8_quant_fwd_inp": {"amax_epsilon": 0.5}}),
            ("mxfp8", {"enable_2d_quantization": True}),
            ("nvfp4", {"disable_stochastic_rounding": True, "disable_2d_quantization": True}),
        ],
    )
    def test_a_factory_makes_the_recipes_own_quantizers(
        self, name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from nemo_fp8_recipes.injection import inject, manifest, require_quantized

        recipe = recipes.load(name, **options)
        skip_unknown(recipe)
        made = megatron_lm.settings(recipe, route="factory")
        args = _parse(made.flags)
        monkeypatch.setenv("NEMO_FP8_RECIPE", made.environment["NEMO_FP8_RECIPE"])
        overrides = {"fp8_recipe": args["fp8_recipe"], "fp8_quantizer_factory": args["fp8_quantizer_factory"]}
        if recipe.precision == "fp4":
            overrides = {
                "fp4_recipe": args["fp4_recipe"],
                "fp4_quantizer_factory": args["fp4_quantizer_factory"],
            }
        found = manifest(_trained(gpt.config_of(recipe, **overrides)), recipe)
        # Every operand of every linear has the formats, blocks and options of the recipe ...
        require_quantized(found, recipe)
        assert {row.te_recipe for row in found.quantized()} == {"CustomRecipe"}
        # ... and injection, which hands TE its own recipe object, gives the same.
        with inject(recipe):
            injected = manifest(_trained(gpt.config_of(recipe)), recipe)
        as_injected = [dataclasses.replace(row, te_recipe=recipe.te_class) for row in found.quantized()]
        assert as_injected == list(injected.quantized())

    @pytest.mark.parametrize(
        ("factory", "variable", "words"),
        [
            ("blockwise", None, "NEMO_FP8_RECIPE is not set"),
            ("blockwise", "tensorwise", "blockwise's and NEMO_FP8_RECIPE names tensorwise"),
            ("tensorwise", '{"name":"tensorwise","fp8_param":true}', "fp8_param"),
            ("delayed", "delayed", "--fp8-amax-history-len"),
        ],
    )
    def test_a_factory_refuses_what_it_cannot_do(
        self, factory: str, variable: str | None, words: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("NEMO_FP8_RECIPE", raising=False)
        if variable is not None:
            monkeypatch.setenv("NEMO_FP8_RECIPE", variable)
        config = gpt.config_of(
            recipes.load("tensorwise"),
            fp8_recipe="custom",
            fp8_quantizer_factory=f"{megatron_lm.FACTORY_MODULE}.{factory}",
        )
        with pytest.raises(Fp8Error, match=words):
            _trained(config)

    @since("2.16")  # before, a role does not say which module asks
    def test_mxfp8_experts_are_refused_in_the_factory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformer_engine.pytorch.quantization import QuantizerRole

        monkeypatch.setenv("NEMO_FP8_RECIPE", "mxfp8")
        with pytest.raises(RecipeError, match="16"):
            megatron_lm.mxfp8(QuantizerRole(module_type="grouped_linear", tensor_type="input"))

    def test_megatron_reads_the_precision_config(self, tmp_path: Path) -> None:
        from megatron.core.quantization.utils import load_quantization_recipe

        from nemo_fp8_recipes.cli import main
        from nemo_fp8_recipes.injection import manifest

        path = tmp_path / "precision.yaml"
        modules = ["--module", "*layers.0.*=bf16", "--module", "*linear_fc2=mxfp8"]
        command = ["args", "fp8_recipe=tensorwise", *modules, "--precision-config", str(path)]
        assert main(command) == 0
        assert main(command) == 0  # the same content again is no conflict
        assert main([*command[:-2], "--module", "*=bf16", *command[-2:]]) == 2
        recipe = recipes.load("tensorwise")
        config = gpt.config_of(recipe, quant_recipe=load_quantization_recipe(str(path)))
        found = {row.module: row for row in manifest(_trained(config), recipe).rows}
        for name in gpt.LINEARS:
            assert not found[f"decoder.layers.0.{name}"].quantized
            expected = "mxfp8" if name.endswith("fc2") else "tensorwise"
            assert found[f"decoder.layers.1.{name}"].recipe == expected
