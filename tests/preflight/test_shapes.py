"""GEMM dimensions on each rank: worked out by hand, and against what the emulated TE really refuses."""

import dataclasses
import re

import pytest

from nemo_fp8_recipes import config, preflight, recipes
from nemo_fp8_recipes.preflight import Hardware, HybridShape, Parallel, PreflightInput
from nemo_fp8_recipes.preflight.shapes import Linear, linears, unmet
from tests.preflight.test_rules import B200, H100, L40S, MODEL, RTX
from tests.support.processes import run_emulated

SHAPE = "FP8-SHP-001"


def found(recipe, model, *, hardware=B200, parallel=None, **options):
    given = PreflightInput(
        recipe=recipes.load(recipe, **options),
        hardware=hardware,
        model=model,
        parallel=parallel or Parallel(),
        te_version="2.20.2",
    )
    return [finding for finding in preflight.check(given) if finding.code == SHAPE]


def sized(**changes):
    return dataclasses.replace(MODEL, **changes)


def test_the_layers_of_a_rank():
    # heads 8 of size 32, 4 groups: qkv = (8 + 2 x 4) x 32 = 512 features; tokens = 128 x 4 = 512
    assert linears(MODEL, Parallel()) == [
        Linear("self_attention.linear_qkv", 512, 512, 512, 256, layers=8),
        Linear("self_attention.linear_proj", 512, 512, 256, 256, layers=8),
        Linear("mlp.linear_fc1", 512, 512, 1024, 256, layers=8),
        Linear("mlp.linear_fc2", 512, 512, 256, 1024, layers=8),
    ]
    assert linears(sized(gated=True), Parallel(tp=2, cp=2, sequence=True)) == [
        Linear("self_attention.linear_qkv", 256, 128, 256, 256, layers=8),
        Linear("self_attention.linear_proj", 256, 128, 256, 128, layers=8),
        Linear("mlp.linear_fc1", 256, 128, 1024, 256, layers=8),
        Linear("mlp.linear_fc2", 256, 128, 256, 512, layers=8),
    ]


def test_the_layers_of_a_hybrid_rank():
    # 8 heads of 64: width 512; in_proj = 2 x 512 + 2 x 2 x 16 + 8 = 1096
    hybrid = HybridShape(
        layer_pattern="M-M*ME",
        mamba_num_heads=8,
        mamba_head_dim=64,
        mamba_state_dim=16,
        mamba_num_groups=2,
        num_experts=4,
        experts_per_token=2,
        expert_ffn_hidden_size=96,
        shared_expert_ffn_hidden_size=192,
    )
    found = linears(sized(num_layers=6, hybrid=hybrid), Parallel(tp=2, ep=2))
    assert {linear.name: linear.layers for linear in found} == {
        "self_attention.linear_qkv": 1,
        "self_attention.linear_proj": 1,
        "mlp.linear_fc1": 1,
        "mlp.linear_fc2": 1,
        "mixer.in_proj": 3,
        "mixer.out_proj": 3,
        "mlp.experts.linear_fc1": 1,
        "mlp.experts.linear_fc2": 1,
        "mlp.shared_experts.linear_fc1": 1,
        "mlp.shared_experts.linear_fc2": 1,
    }
    sizes = {linear.name: (linear.tokens, linear.output_features, linear.input_features) for linear in found}
    assert sizes["mixer.in_proj"] == (512, 548, 256)
    assert sizes["mixer.out_proj"] == (512, 256, 256)
    # 512 tokens to 2 of 4 experts, from two ranks: 512 an expert, two experts a rank
    assert sizes["mlp.experts.linear_fc1"] == (512, 96, 256)
    assert next(linear.copies for linear in found if linear.name == "mlp.experts.linear_fc2") == 2


def test_mambas_projection_is_cut_over_ranks():
    """Nemotron-H 8B: 18560 features; 2320 on each of 8 ranks are no multiple of 32, 4640 on each of 4 are."""
    model = preflight.job_input(config.compose(["model=nemotron_h_8b"]), {}, emulated=False).model
    for tp, wrong in ((8, ["model.hybrid.mamba_num_heads"]), (4, [])):
        given = PreflightInput(
            recipe=recipes.load("mxfp8"),
            hardware=B200,
            model=model,
            parallel=Parallel(tp=tp),
            te_version="2.20.2",
        )
        found = [finding for finding in preflight.check(given) if finding.code == SHAPE]
        assert [finding.key for finding in found] == wrong
        assert all("parallel.tp=4" in finding.fix for finding in found)


@pytest.mark.parametrize(
    ("recipe", "hardware", "tokens", "fine"),
    [
        ("mxfp8", B200, 96, True),
        ("mxfp8", B200, 80, False),
        ("nvfp4", B200, 96, True),
        ("nvfp4", B200, 80, False),
        ("nvfp4", B200, 72, False),
        ("tensorwise", H100, 80, True),
        ("tensorwise", H100, 72, False),  # inner dimension of wgrad
        ("tensorwise", B200, 72, True),  # any layout
        ("tensorwise", B200, 68, False),
        ("delayed", L40S, 72, False),
        ("delayed", RTX, 72, False),  # 12.x takes one layout only
        ("blockwise", H100, 80, True),
        ("blockwise", H100, 72, False),
        ("bf16", H100, 7, True),
    ],
)
def test_tokens(recipe, hardware, tokens, fine):
    model = sized(seq_length=tokens, micro_batch_size=1)
    assert (found(recipe, model, hardware=hardware) == []) == fine


def test_only_the_forward_gemm_counts_when_backward_runs_in_high_precision():
    model = sized(seq_length=72, micro_batch_size=1)
    assert found("tensorwise", model, hardware=H100)
    assert found("tensorwise", model, hardware=H100, backward_override="dequantized") == []


def test_sequence_parallelism_counts_the_tokens_of_a_rank():
    model = sized(seq_length=64, micro_batch_size=1)
    assert found("mxfp8", model, parallel=Parallel(tp=4)) == []
    (finding, *_) = found("mxfp8", model, parallel=Parallel(tp=4, sequence=True))
    assert "16 tokens on each rank" in finding.message
    assert "model.seq_length=128" in finding.fix


def test_features_of_a_rank():
    model = sized(ffn_hidden_size=96)
    assert found("mxfp8", model, parallel=Parallel(tp=1)) == []
    (finding,) = found("mxfp8", model, parallel=Parallel(tp=2))
    assert finding.key == "model.ffn_hidden_size"
    assert "48 output features on each rank" in finding.message
    assert "64 or 128" in finding.fix


def test_one_finding_for_one_key():
    assert len(found("mxfp8", sized(seq_length=100, micro_batch_size=1))) == 1


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "mxfp8", "blockwise", "nvfp4"])
@pytest.mark.parametrize(
    "changes",
    [
        {"seq_length": 100, "micro_batch_size": 1},
        {"ffn_hidden_size": 1000},
        {"hidden_size": 264},
        {"num_attention_heads": 8, "kv_channels": 20},
        {"seq_length": 4092, "micro_batch_size": 1},
    ],
)
def test_the_values_it_offers_work(recipe, changes):
    """Each way out, tried: it removes the finding it belongs to."""
    model = sized(**changes)
    for finding in found(recipe, model, hardware=H100):
        for key, values in re.findall(r"(?:model|training)\.(\w+)=([\d or]+)", finding.fix):
            for value in values.split(" or "):
                put_right = found(recipe, dataclasses.replace(model, **{key: int(value)}), hardware=H100)
                assert finding.message not in [other.message for other in put_right]
                assert (finding.key, finding.message.split(" has ")[0]) not in [
                    (other.key, other.message.split(" has ")[0]) for other in put_right
                ], f"{key}={value} does not help"


@pytest.mark.parametrize("model", ["nemotron_tiny", "nemotron3_4b", "nemotron3_8b"])
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "mxfp8", "blockwise"])
def test_our_own_models_run_with_every_recipe(model, recipe):
    for tp in (1, 2, 4):
        overrides = [f"model={model}", f"fp8_recipe={recipe}", "hardware=b200", f"parallel.tp={tp}"]
        assert preflight.check_job(config.compose(overrides), {}, emulated=False) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "device"),
    [
        ("tensorwise", "h100"),
        ("delayed", "h100"),
        ("blockwise", "h100"),
        ("mxfp8", "b200"),
        ("tensorwise", "b200"),
    ],
)
def test_preflight_agrees_with_what_te_refuses(recipe, device):
    """TE's own linear layer on the emulated device, forward and backward, over a grid of dimensions."""
    grid = [(m, n, k) for m in (8, 16, 24, 32, 36) for n in (16, 24, 32) for k in (16, 32, 40)]
    refused = run_emulated(
        f"""
        import torch
        import transformer_engine.pytorch as te
        from nemo_fp8_recipes import recipes
        refused = []
        for m, n, k in {grid!r}:
            layer = te.Linear(k, n, bias=False, params_dtype=torch.bfloat16)
            x = torch.ones(m, k, dtype=torch.bfloat16, requires_grad=True)
            try:
                with te.fp8_autocast(enabled=True, fp8_recipe=recipes.load({recipe!r}).te()):
                    y = layer(x)
                y.sum().backward()
            except (ValueError, RuntimeError, AssertionError):
                refused.append([m, n, k])
        result(refused)
        """,
        device=device,
    )
    hardware = config.load_hardware(device)
    predicted = []
    for m, n, k in grid:
        linear = Linear("any", m, m, n, k)
        if _unmet(recipe, hardware.compute_capability, linear):
            predicted.append([m, n, k])
    assert predicted == refused
    assert 0 < len(refused) < len(grid)


def _unmet(recipe, capability, linear):
    from nemo_fp8_recipes.preflight.shapes import demands

    return [
        demand
        for demand in demands(recipes.load(recipe), capability)
        if linear.size(demand.dimension) % demand.multiple
    ]


def test_unmet_names_layer_and_demand():
    (linear, demand), *_ = unmet(recipes.load("mxfp8"), (10, 0), sized(ffn_hidden_size=1000), Parallel())
    assert (linear.name, demand.dimension, demand.multiple) == ("mlp.linear_fc1", "output features", 32)


def test_unknown_hardware_is_judged_strictly():
    model = sized(seq_length=72, micro_batch_size=1)
    assert found("tensorwise", model, hardware=Hardware())
