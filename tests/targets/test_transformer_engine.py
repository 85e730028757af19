"""The TE object: TE's own class, every option in it and in effect."""

import dataclasses

import pytest

from nemo_fp8_recipes import recipes
from nemo_fp8_recipes.errors import RecipeError
from nemo_fp8_recipes.targets import transformer_engine as target
from nemo_fp8_recipes.targets.versions import at_least
from tests.support.processes import run_emulated, run_python
from tests.support.te_release import RELEASE

FP8_RECIPES = ("delayed", "tensorwise", "mxfp8", "blockwise", "nvfp4")


def te_classes():
    return target._from_file()


@pytest.mark.parametrize("name", FP8_RECIPES)
def test_every_option_of_te_is_an_option_of_ours(name):
    recipe = recipes.load(name)
    te_class = getattr(te_classes(), recipe.te_class)
    theirs = {field.name for field in dataclasses.fields(te_class)}
    theirs |= {key for key in vars(te_class) if key.startswith("fp8_quant_")}
    ours = {field.name for field in dataclasses.fields(recipe)}
    assert theirs - ours == set()
    claimed = {
        field.name: field.metadata["since"] for field in dataclasses.fields(recipe) if field.metadata["te"]
    }
    later = {name for name, since in claimed.items() if since is not None and not at_least(RELEASE, since)}
    assert claimed.keys() - theirs == later, "an option says that TE has it, and TE has not"


@pytest.mark.parametrize("name", FP8_RECIPES)
def test_defaults_are_tes_own(name):
    built = target.preview(recipes.load(name))
    plain = type(built)()
    assert repr(built) == repr(plain)
    assert built == plain


def test_bf16_has_no_object():
    assert target.preview(recipes.load("bf16")) is None
    assert recipes.load("bf16").te() is None


def qparams(built):
    return [
        (getattr(built, name).power_2_scale, getattr(built, name).amax_epsilon)
        for name in ("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad")
    ]


def test_tensorwise_options_reach_what_modules_read():
    built = target.preview(recipes.load("tensorwise", use_power_2_scales=True, amax_epsilon=1e-4))
    assert built.use_power_2_scales is True
    assert qparams(built) == [(True, 1e-4)] * 3


def test_one_operand_may_differ():
    built = target.preview(
        recipes.load(
            "tensorwise", amax_epsilon=1e-4, fp8_quant_bwd_grad={"amax_epsilon": 0.5, "power_2_scale": True}
        )
    )
    assert qparams(built) == [(False, 1e-4), (False, 1e-4), (True, 0.5)]


def test_fp32_block_scales_reach_what_quantizers_read():
    assert qparams(target.preview(recipes.load("blockwise"))) == [(True, 0.0)] * 3
    assert qparams(target.preview(recipes.load("blockwise", use_f32_scales=True))) == [(False, 0.0)] * 3


def test_objects_do_not_share_their_options():
    target.preview(recipes.load("blockwise", use_f32_scales=True))
    assert qparams(target.preview(recipes.load("blockwise"))) == [(True, 0.0)] * 3
    assert qparams(te_classes().Float8BlockScaling()) == [(True, 0.0)] * 3


def test_the_rest_arrives():
    delayed = target.preview(
        recipes.load(
            "delayed", margin=2, fp8_format="e4m3", amax_history_len=16, amax_compute_algo="most_recent"
        )
    )
    assert (delayed.margin, delayed.fp8_format.name, delayed.amax_history_len) == (2, "E4M3", 16)
    assert delayed.amax_compute_algo == "most_recent"
    assert target.preview(recipes.load("mxfp8", fp8_format="hybrid")).fp8_format.name == "HYBRID"
    if at_least(RELEASE, "2.19"):
        assert (
            target.preview(recipes.load("mxfp8", enable_2d_quantization=True)).enable_2d_quantization is True
        )
    blocks = target.preview(recipes.load("blockwise", w_block_scaling_dim=1, grad_block_scaling_dim=2))
    assert (blocks.w_block_scaling_dim, blocks.grad_block_scaling_dim) == (1, 2)
    split = target.preview(recipes.load("tensorwise", fp8_gemm_fprop={"use_split_accumulator": True}))
    assert split.fp8_gemm_fprop.use_split_accumulator is True
    fp4 = target.preview(recipes.load("nvfp4", disable_rht=True, disable_2d_quantization=True))
    assert fp4.fp4_quant_fwd_inp.random_hadamard_transform is False
    assert fp4.fp4_quant_fwd_weight.fp4_2d_quantization is False


def test_a_function_by_its_path():
    built = target.preview(recipes.load("delayed", amax_compute_algo="math:fsum"))
    import math

    assert built.amax_compute_algo is math.fsum
    with pytest.raises(RecipeError, match="cannot be imported"):
        target.preview(recipes.load("delayed", amax_compute_algo="no_such_module:f"))
    with pytest.raises(RecipeError, match="not a function"):
        target.preview(recipes.load("delayed", amax_compute_algo="math:pi"))


def test_the_environment_does_not_decide():
    """TE reads these when its classes are made: a process of its own."""
    run_python(
        """
        from nemo_fp8_recipes import recipes
        from nemo_fp8_recipes.targets.transformer_engine import preview
        blocks = preview(recipes.load("blockwise"))
        assert blocks.use_f32_scales is False and blocks.fp8_quant_fwd_inp.power_2_scale is True
        tensor = preview(recipes.load("tensorwise"))
        assert tensor.use_power_2_scales is False and tensor.fp8_quant_fwd_weight.power_2_scale is False
        assert getattr(tensor, "backward_override", None) is None
        fp4 = preview(recipes.load("nvfp4"))
        assert fp4.disable_rht is False and fp4.fp4_quant_fwd_inp.random_hadamard_transform is True
        # and the environment is what TE itself would have followed
        assert type(blocks)().use_f32_scales is True and type(fp4)().disable_rht is True
        """,
        env={
            "NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1",
            "NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES": "1",
            "NVTE_BACKWARD_OVERRIDE": "high_precision",
            "NVTE_NVFP4_DISABLE_RHT": "1",
        },
    )


def test_preview_imports_no_torch():
    run_python(
        """
        import sys
        from nemo_fp8_recipes import recipes
        from nemo_fp8_recipes.targets.transformer_engine import preview
        assert "DelayedScaling" in repr(preview(recipes.load("delayed")))
        assert not {"torch", "transformer_engine"} & set(sys.modules)
        """
    )


def test_the_object_for_te_is_of_tes_classes():
    """Also after a preview in the same process: TE compares with isinstance."""
    assert (
        run_emulated(
            """
        from nemo_fp8_recipes import recipes
        from nemo_fp8_recipes.targets.transformer_engine import preview
        preview(recipes.load("mxfp8"))
        import transformer_engine.common.recipe as te
        built = {name: recipes.load(name).te() for name in recipes.names()}
        result([
            type(built["delayed"]) is te.DelayedScaling,
            type(built["tensorwise"]) is te.Float8CurrentScaling,
            type(built["mxfp8"]) is te.MXFP8BlockScaling,
            type(built["blockwise"]) is te.Float8BlockScaling,
            type(built["nvfp4"]) is te.NVFP4BlockScaling,
            type(preview(recipes.load("mxfp8"))) is te.MXFP8BlockScaling,
        ])
        """
        )
        == [True] * 6
    )


@pytest.mark.parametrize(
    ("version", "name", "options", "newer"),
    [
        ("2.18.0", "mxfp8", {"enable_2d_quantization": True}, [("enable_2d_quantization", "2.19")]),
        ("2.19.0", "mxfp8", {"enable_2d_quantization": True}, []),
        ("2.18.0", "mxfp8", {}, []),
        ("2.7.0", "nvfp4", {}, [("name", "2.8")]),
        ("2.20.2+cuda", "nvfp4", {"nvfp4_4over6": "weights"}, []),
        ("2.9", "tensorwise", {"backward_override": "dequantized"}, [("backward_override", "2.15")]),
    ],
)
def test_options_newer_than_the_installed_te(version, name, options, newer):
    assert target.newer_options(recipes.load(name, **options), version) == newer


def test_a_newer_option_is_an_error_that_names_the_version(monkeypatch):
    monkeypatch.setattr(target, "installed_version", lambda: "2.18.1")
    with pytest.raises(
        RecipeError, match=r"enable_2d_quantization=True needs Transformer Engine 2\.19, and 2\.18\.1"
    ):
        target.preview(recipes.load("mxfp8", enable_2d_quantization=True))
    assert target.preview(recipes.load("mxfp8")) is not None


def test_te_that_cannot_be_imported_says_what_to_do():
    run_python(
        """
        import sys
        sys.modules["transformer_engine"] = None
        from nemo_fp8_recipes import recipes
        from nemo_fp8_recipes.errors import RecipeError
        try:
            recipes.load("mxfp8").te()
        except RecipeError as error:
            assert "emulation.install()" in str(error), error
        else:
            raise SystemExit("no error")
        """
    )
