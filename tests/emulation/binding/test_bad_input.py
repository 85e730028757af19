"""Tensors that callers should not, or seldom, pass: refused in TE's words, or quantised as they should be."""

from __future__ import annotations

import pytest
import torch

from nemo_fp8_recipes import emulation
from tests.emulation.binding.test_quantize import blockwise, delayed, mxfp8, tensorwise
from tests.support.te_release import RELEASE

RECIPES = ("delayed", "tensorwise", "mxfp8", "blockwise", "nvfp4")


def quantizer(te, name):
    if name == "nvfp4":
        from transformer_engine.pytorch.tensor.nvfp4_tensor import NVFP4Quantizer

        return NVFP4Quantizer()
    return {"delayed": delayed, "tensorwise": tensorwise, "mxfp8": mxfp8, "blockwise": blockwise}[name](te)


@pytest.fixture(params=RECIPES)
def quantize(request, te, tex, blackwell):
    """Quantise with a fresh quantizer of every recipe."""

    def one(x):
        return tex.quantize(x, quantizer(te, request.param))

    one.recipe = request.param
    return one


@pytest.mark.parametrize(
    ("dtype", "says"),
    [
        (torch.int32, "Unsupported dtype Int32. Expected one of: Float32, Float16, BFloat16"),
        (torch.int64, "Unsupported dtype Int64"),
        (torch.uint8, "Unsupported dtype Byte"),
        (torch.bool, "Unsupported dtype Byte"),
        (torch.float8_e4m3fn, "Unsupported dtype Float8E4M3"),
        (torch.float64, r"Invalid type \(7\)"),
        (torch.complex64, r"Invalid type \(9\)"),
    ],
    ids=str,
)
def test_other_dtypes_are_refused(quantize, dtype, says):
    with pytest.raises(RuntimeError, match=says):
        quantize(torch.ones(32, 64).to(dtype))


def test_a_tensor_without_data_is_refused(quantize):
    with pytest.raises(RuntimeError, match="is on meta"):
        quantize(torch.ones(32, 64, device="meta"))


def test_no_kernel_takes_integers_or_tensors_without_data(te, tex):
    integers, nowhere, good = torch.ones(32, 32).int(), torch.ones(32, 32, device="meta"), torch.ones(32, 32)

    def gemm(a, b):
        tag = te.DType.kFloat32
        return tex.generic_gemm(
            a, True, b, False, None, None, tag, None, tag, False, None, False, torch.empty(0), 0, False, True
        )

    for bad in (integers, nowhere):
        for call in (
            lambda bad=bad: tex.gelu(bad, None),
            lambda bad=bad: tex.swiglu(bad, None),
            lambda bad=bad: tex.dgelu(good, bad, None),
            lambda bad=bad: tex.layernorm_fwd(
                bad, torch.ones(32), None, 1e-5, None, None, te.DType.kFloat32, 0, False
            ),
            lambda bad=bad: tex.rmsnorm_fwd(
                bad, torch.ones(32), 1e-5, None, None, te.DType.kFloat32, 0, False
            ),
            lambda bad=bad: gemm(bad, good),
            lambda bad=bad: gemm(good, bad),
        ):
            with pytest.raises(RuntimeError, match=r"Unsupported dtype Int32|is on meta"):
                call()


def test_a_tensor_made_on_the_host_counts_as_one_on_the_device(te):
    """There is one memory: what would be mixed devices on a GPU is not, and gives the same numbers."""
    module = te.Linear(64, 64, params_dtype=torch.bfloat16, device="cuda")
    x = torch.randn(32, 64, dtype=torch.bfloat16)
    assert torch.equal(module(x.cpu()), module(x.to("cuda")))
    refusal = AssertionError if RELEASE == "2.11" else RuntimeError
    with pytest.raises(refusal, match="needs CUDA"):
        module(x.to("meta"))


REFUSED_SHAPES = {
    "mxfp8": [
        ((), "MXFP8 requires tensor dims that are divisible by 32 (got shape=())"),
        ((32,), "MXFP8 requires tensor dims that are divisible by 32 (got shape=(32,))"),
        ((32, 48), "MXFP8 requires tensor dims that are divisible by 32 (got shape=(32, 48))"),
        ((3, 32, 32, 1), "MXFP8 requires tensor dims that are divisible by 32 (got shape=(3, 32, 32, 1))"),
    ],
    "nvfp4": [
        ((), "First dim for NVFP4 must be divisible by 16 (got shape=())"),
        ((24, 32), "First dim for NVFP4 must be divisible by 16 (got shape=(24, 32))"),
        ((32, 24), "NVFP4 requires tensor dims that are divisible by 16 (got shape=(32, 24))"),
    ],
}


@pytest.mark.parametrize("recipe", REFUSED_SHAPES)
def test_shapes_that_a_recipe_cannot_quantise(te, tex, blackwell, recipe):
    for shape, says in REFUSED_SHAPES[recipe]:
        for make in (
            lambda shape=shape: tex.quantize(torch.ones(shape), quantizer(te, recipe)),
            lambda shape=shape: quantizer(te, recipe).make_empty(shape),
        )[: 1 if RELEASE in ("2.11", "2.14") else 2]:  # there TE's Python makes empty tensors itself
            with pytest.raises(RuntimeError) as refusal:
                make()
            assert str(refusal.value).endswith(says)


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 5, 1, 7)], ids=str)
def test_the_others_quantise_any_shape(te, tex, blackwell, recipe, shape):
    x = torch.full(shape, 2.0)
    found = tex.quantize(x, quantizer(te, recipe))
    assert found.shape == torch.Size(shape)
    assert torch.equal(found.dequantize(), x)


@pytest.mark.parametrize("shape", [(2, 1, 4, 8, 64), (1, 2, 32, 64), (64, 64)], ids=str)
def test_more_dimensions_are_their_flattened_matrix(quantize, shape):
    x = torch.randn(shape)
    found, flat = quantize(x), quantize(x.view(-1, shape[-1]))
    assert found.shape == x.shape
    assert torch.equal(found.dequantize().view(-1, shape[-1]), flat.dequantize())


@pytest.mark.parametrize("shape", [(0, 64), (32, 0), (2, 0, 64)], ids=str)
def test_empty_tensors_stay_empty(quantize, shape):
    found = quantize(torch.empty(shape))
    assert found.shape == torch.Size(shape)
    assert found.dequantize().shape == torch.Size(shape)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t(),
        lambda x: x[::2, ::2],
        lambda x: x[1:65, 3:67],
        lambda x: x[:1, :64].expand(64, 64),
        lambda x: x.view(2, 64, 128).transpose(0, 1)[..., 64:],
        lambda x: x.flip(0),
    ],
    ids=["transposed", "strided", "slice", "expanded", "3-d", "flipped"],
)
def test_views_are_quantised_as_their_copies(quantize, view):
    x = torch.randn(128, 128)
    seen, copied = view(x), view(x).clone(memory_format=torch.contiguous_format)
    found, expected = quantize(seen), quantize(copied)
    assert torch.equal(found.dequantize(), expected.dequantize())
    for name in ("_data", "_rowwise_data", "_columnwise_data", "_rowwise_scale_inv", "_scale_inv"):
        here, there = getattr(found, name, None), getattr(expected, name, None)
        assert (here is None) == (there is None)
        assert here is None or torch.equal(here, there)


@pytest.mark.parametrize("recipe", ["Float8CurrentScaling", "MXFP8BlockScaling", "Float8BlockScaling"])
def test_modules_take_views_and_five_dimensions(te, blackwell, recipe):
    from transformer_engine.common import recipe as recipes

    module = te.LayerNormLinear(64, 96, params_dtype=torch.bfloat16, device="cuda")
    base = torch.randn(64, 2, 2, 4, 8, dtype=torch.bfloat16)
    seen = base.permute(3, 1, 2, 4, 0)  # 4, 2, 2, 8, 64: innermost stride 128
    with te.autocast(enabled=True, recipe=getattr(recipes, recipe)()), emulation.trace() as observed:
        found, expected = module(seen), module(seen.contiguous())
    assert found.shape == (4, 2, 2, 8, 96)
    assert torch.equal(found, expected)
    assert [gemm.quantized for gemm in observed.gemms] == [True, True]
