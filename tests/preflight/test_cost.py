"""Bytes and work that doctor states: against the tensors TE really holds, and against sums done by hand."""

import dataclasses

import pytest

from nemo_fp8_recipes import preflight, recipes
from nemo_fp8_recipes.preflight import Parallel
from nemo_fp8_recipes.preflight.cost import _of_one
from nemo_fp8_recipes.preflight.shapes import Linear
from nemo_fp8_recipes.recipes.modules import ModuleRecipe
from tests.preflight.test_rules import B200, H100, MODEL
from tests.support.processes import run_emulated
from tests.support.stack import Draw, held

M, N, K = 160, 192, 320

# What waits between forward and backward of one linear layer, as autograd holds it: every tensor counted
# once, the BF16 weight included.
HELD = """
import torch, transformer_engine.pytorch as te
from nemo_fp8_recipes import recipes
found = {}
for name, options in CASES:
    layer = te.Linear(K, N, bias=False, params_dtype=torch.bfloat16)
    x = torch.randn(M, K, dtype=torch.bfloat16, requires_grad=True)
    seen = {}
    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        recipe = recipes.load(name, **options).te()
        with te.autocast(enabled=recipe is not None, recipe=recipe):
            y = layer(x)
    found[f"{name} {options}"] = sum(seen.values())
result(found)
"""
CASES = {
    "h100": [
        ("bf16", {}),
        ("delayed", {}),
        ("tensorwise", {}),
        ("blockwise", {}),
        ("blockwise", {"w_block_scaling_dim": 1}),
    ],
}


@pytest.mark.parametrize("device", CASES)
def test_bytes_are_those_of_te_tensors(device):
    sizes = f"M, N, K = {M}, {N}, {K}\nCASES = {CASES[device]!r}\n"
    held = run_emulated(sizes + HELD, device=device)
    capability = {"h100": H100, "b200": B200}[device].capability
    linear = Linear("linear", M, M, N, K)
    stated = {}
    for name, options in CASES[device]:
        one = _of_one(linear, recipes.load(name, **options), capability)
        stated[f"{name} {options}"] = one["weights"] + one["saved_inputs"]
    assert stated == held


def spent(recipe, *, model=MODEL, capability=(10, 0), parallel=None, **options):
    return preflight.cost(recipes.load(recipe, **options), capability, model, parallel or Parallel())


def test_work_by_hand():
    """8 layers; tokens 512; qkv 512 x 256, proj 256 x 256, fc1 1024 x 256, fc2 256 x 1024."""
    weights = 512 * 256 + 256 * 256 + 2 * 1024 * 256
    linear = 8 * 3 * 2 * 512 * weights
    attention = 8 * 3 * 2 * 2 * 512 * 128 * 256
    output = 3 * 2 * 512 * 256 * 256
    found = spent("mxfp8")
    assert found.gemm_flops == linear + attention + output
    assert found.quantised_flops == linear
    assert spent("mxfp8", backward_override="high_precision").quantised_flops == linear // 3
    assert spent("bf16").quantised_share == 0
    assert spent("bf16").weights == 8 * 2 * weights


def test_layers_in_bf16_are_not_counted():
    half = spent("mxfp8", num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=3)
    assert half.quantised_flops * 2 == spent("mxfp8").quantised_flops
    assert half.weights * 2 == spent("mxfp8").weights + spent("bf16").weights


def test_modules_with_another_recipe_are_counted_as_such():
    """fc2 of every layer, 256 x 1024 of 512 x 256 + 256 x 256 + 2 x 1024 x 256, and qkv of one layer."""
    modules = (ModuleRecipe("*linear_fc2", "bf16"), ModuleRecipe("decoder.layers.3.*qkv", "nvfp4"))
    found = preflight.cost(recipes.load("mxfp8"), (10, 0), MODEL, Parallel(), modules)
    whole, plain = spent("mxfp8"), spent("bf16")
    assert found.gemm_flops == whole.gemm_flops
    assert whole.quantised_flops - found.quantised_flops == 8 * 3 * 2 * 512 * 256 * 1024
    assert plain.saved_inputs > found.saved_inputs > whole.saved_inputs
    everything = preflight.cost(
        recipes.load("mxfp8"), (10, 0), MODEL, Parallel(), (ModuleRecipe("*", "bf16"),)
    )
    assert everything == plain


def test_a_module_quantised_on_its_own_is_so_in_a_layer_in_bf16():
    options = {"num_layers_at_start_in_bf16": 8}
    modules = (ModuleRecipe("*linear_fc1", "mxfp8"),)
    found = preflight.cost(recipes.load("tensorwise", **options), (10, 0), MODEL, Parallel(), modules)
    assert found.quantised_flops == 8 * 3 * 2 * 512 * 256 * 1024


def test_fp8_weights_replace_the_bf16_ones():
    assert spent("mxfp8").weights - spent("mxfp8", fp8_param=True).weights == spent("bf16").weights


def test_fp8_can_need_more_than_bf16():
    """Weights in both directions beside the BF16 ones, and few tokens to save."""
    few = dataclasses.replace(MODEL, micro_batch_size=1, seq_length=32)
    assert spent("mxfp8", model=few).held > spent("bf16", model=few).held
    many = dataclasses.replace(MODEL, micro_batch_size=64)
    assert spent("mxfp8", model=many).held < spent("bf16", model=many).held
    # on Blackwell a per-tensor FP8 GEMM reads one copy in both directions
    assert spent("tensorwise").weights < spent("tensorwise", capability=(9, 0)).weights


def test_ranks_share():
    whole, cut = spent("mxfp8"), spent("mxfp8", parallel=Parallel(tp=2))
    assert cut.quantised_flops * 2 == whole.quantised_flops
    assert spent("bf16", parallel=Parallel(pp=2)).weights * 2 == spent("bf16").weights


# A whole model of Megatron-Core: sizes that every recipe takes and that no two dimensions share.
SMALL = Draw(
    recipe="bf16",
    options={},
    hidden_size=96,
    ffn_hidden_size=320,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=32,
    seq_length=64,
    micro_batch_size=2,
    gated=True,
    num_layers=3,
)
HELD_BY_A_MODEL = {
    "b200": [
        ("bf16", {}),
        ("delayed", {}),
        ("tensorwise", {"num_layers_at_start_in_bf16": 1}),
        ("mxfp8", {}),
        ("mxfp8", {"enable_2d_quantization": True, "num_layers_at_end_in_bf16": 2}),
        ("blockwise", {}),
        ("nvfp4", {}),
    ],
    "h100": [
        ("delayed", {}),
        ("tensorwise", {}),
        ("blockwise", {}),
        ("blockwise", {"w_block_scaling_dim": 1}),
    ],
}


def stated(job, hardware):
    model = dataclasses.replace(
        MODEL,
        **{
            field.name: getattr(job, field.name)
            for field in dataclasses.fields(job)
            if hasattr(MODEL, field.name)
        },
    )
    found = preflight.cost(recipes.load(job.recipe, **job.options), hardware.capability, model, Parallel())
    return {"weights": found.weights, "saved_inputs": found.saved_inputs}


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("recipe", "options"), HELD_BY_A_MODEL["b200"])
def test_bytes_are_those_of_a_model(recipe, options):
    job = dataclasses.replace(SMALL, recipe=recipe, options=options)
    assert stated(job, B200) == held(job)


def test_bytes_are_those_of_a_model_on_hopper():
    jobs = [
        dataclasses.replace(SMALL, recipe=recipe, options=options)
        for recipe, options in HELD_BY_A_MODEL["h100"]
    ]
    found = run_emulated(
        f"""
        from tests.support.stack import Draw, held
        result([held(Draw(**job)) for job in {[job.to_dict() for job in jobs]!r}])
        """,
        device="h100",
    )
    assert [stated(job, H100) for job in jobs] == found
