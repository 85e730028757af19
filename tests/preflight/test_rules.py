"""Every finding: the job that has it, and its neighbour that has not."""

import dataclasses

import pytest

from nemo_fp8_recipes import config, preflight, recipes
from nemo_fp8_recipes.errors import ConfigError, PreflightError
from nemo_fp8_recipes.preflight import (
    Finding,
    Hardware,
    HybridShape,
    MegatronSettings,
    ModelShape,
    Parallel,
    PreflightInput,
)
from nemo_fp8_recipes.recipes.modules import ModuleRecipe

H100 = Hardware(name="h100", display_name="H100", capability=(9, 0), memory_gb=80)
B200 = Hardware(name="b200", display_name="B200", capability=(10, 0))
L40S = Hardware(name="l40s", display_name="L40S", capability=(8, 9))
A100 = Hardware(name="a100", display_name="A100", capability=(8, 0))
RTX = Hardware(name="rtx_pro_6000", display_name="RTX PRO 6000", capability=(12, 0))

MODEL = ModelShape(
    num_layers=8,
    hidden_size=256,
    ffn_hidden_size=1024,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=None,
    vocab_size=256,
    seq_length=128,
    micro_batch_size=4,
)
LARGE = dataclasses.replace(
    MODEL, num_layers=96, hidden_size=18432, ffn_hidden_size=73728, num_attention_heads=96, num_query_groups=8
)
EXPERTS = dataclasses.replace(
    MODEL,
    num_layers=4,
    hybrid=HybridShape(
        layer_pattern="*E*E",
        mamba_num_heads=8,
        mamba_head_dim=64,
        mamba_state_dim=16,
        mamba_num_groups=2,
        num_experts=4,
        experts_per_token=2,
        expert_ffn_hidden_size=256,
    ),
)


def job(
    recipe="mxfp8", *, hardware=B200, model=MODEL, parallel=None, options=None, **changes
) -> PreflightInput:
    return PreflightInput(
        recipe=recipes.load(recipe, **(options or {})),
        hardware=hardware,
        model=model,
        parallel=parallel or Parallel(),
        te_version=changes.pop("te_version", "2.20.2"),
        megatron=MegatronSettings(**changes.pop("megatron", {})),
        **changes,
    )


def codes(given: PreflightInput) -> list[str]:
    return [finding.code for finding in preflight.check(given)]


def only(given: PreflightInput) -> Finding:
    (finding,) = preflight.check(given)
    return finding


@pytest.mark.parametrize("recipe", [name for name in recipes.names() if name != "bf16"])
def test_a_sound_job_has_no_findings(recipe):
    assert codes(job(recipe)) == []


# What runs where, from the table in TE's documentation of its checks: columns 8.0, 8.9, 9.0, 10.0, 12.0.
RUNS = {
    "bf16": (1, 1, 1, 1, 1),
    "delayed": (0, 1, 1, 1, 1),
    "tensorwise": (0, 1, 1, 1, 1),
    "blockwise": (0, 0, 1, 1, 1),
    "mxfp8": (0, 0, 0, 1, 0),
    "nvfp4": (0, 0, 0, 1, 1),
}


@pytest.mark.parametrize("recipe", RUNS)
@pytest.mark.parametrize(("column", "hardware"), list(enumerate((A100, L40S, H100, B200, RTX))))
def test_recipe_by_gpu(recipe, column, hardware):
    assert ("FP8-HW-001" not in codes(job(recipe, hardware=hardware))) == bool(RUNS[recipe][column])


def test_the_refusal_names_the_reason_and_the_recipes_that_run():
    finding = only(job("mxfp8", hardware=H100))
    assert (finding.code, finding.severity, finding.key, finding.value) == (
        "FP8-HW-001",
        "error",
        "hardware",
        "h100",
    )
    assert "compute capability 10.0" in finding.message
    assert "H100 has 9.0" in finding.message
    assert "bf16, delayed, tensorwise, blockwise" in finding.fix
    assert "quantization.py" in finding.source


def selective(*modules):
    return {"recompute_granularity": "selective", "recompute_modules": modules}


def offload(*modules):
    return {"fine_grained_activation_offloading": True, "offload_modules": modules}


def graphs(*scope, impl="local"):
    return {"cuda_graph_impl": impl, "cuda_graph_scope": scope}


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
OVERLAP = {"tp_comm_overlap": True}
REUSE = {"reuse_grad_buf_for_mxfp8_param_ag": True}
PADDING = {"moe_router_padding_for_quantization": True}
SEQUENCE = Parallel(tp=2, sequence=True)
ENDS = {"num_layers_at_start_in_bf16": 1}
SEGMENTS = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}

FOUND = [
    ("FP8-HW-002", job(hardware=Hardware()), job()),
    (
        "FP8-HW-003",
        job("blockwise", options={"use_f32_scales": True}),
        job("blockwise", options={"use_f32_scales": True}, hardware=H100),
    ),
    (
        "FP8-HW-003",
        job("blockwise", options={"fp8_quant_bwd_grad": {"power_2_scale": False}}),
        job("blockwise"),
    ),
    ("FP8-HW-004", job("blockwise", cuda_version=(12, 8)), job("blockwise", cuda_version=(12, 9))),
    ("FP8-HW-004", job("blockwise", cuda_version=(12, 8)), job("mxfp8", cuda_version=(12, 8))),
    ("FP8-HW-004", job("mxfp8", cuda_version=(12, 6)), job("mxfp8", cuda_version=(12, 6), emulated=True)),
    (
        "FP8-HW-004",
        job("delayed", hardware=L40S, cuda_version=(12, 0)),
        job("delayed", hardware=H100, cuda_version=(12, 0)),
    ),
    (
        "FP8-HW-005",
        job("blockwise", te_version="2.8"),
        job("blockwise", te_version="2.8", hardware=H100),
    ),
    (
        "FP8-HW-006",
        job("tensorwise", hardware=H100, model=LARGE),
        job("tensorwise", hardware=H100, model=LARGE, parallel=Parallel(tp=8, pp=12)),
    ),
    (
        # In BF16 the weights take half of that, and fit.
        "FP8-HW-006",
        job("blockwise", hardware=H100, model=LARGE, parallel=Parallel(tp=8, pp=2)),
        job(
            "blockwise",
            hardware=H100,
            model=LARGE,
            parallel=Parallel(tp=8, pp=2),
            modules=(ModuleRecipe("*", "bf16"),),
        ),
    ),
    ("FP8-EMU-003", job(megatron=graphs(), emulated=True), job(megatron=graphs())),
    ("FP8-EMU-004", job(te_version="2.18.0", emulated=True), job(te_version="2.18.0")),
    ("FP8-EMU-004", job(te_version="2.18.0", emulated=True), job(te_version="2.11.0+4f1c", emulated=True)),
    ("FP8-EMU-002", job(options={"fp8_dpa": True}, emulated=True), job(options={"fp8_dpa": True})),
    (
        "FP8-ATT-001",
        job("nvfp4", options={"fp8_dpa": True}),
        job("nvfp4", options={"fp8_dpa": True}, environment={"NVTE_DPA_FP8_RECIPE": "Float8CurrentScaling"}),
    ),
    ("FP8-ATT-001", job(options={"fp8_dpa": True, "fp8_mha": True}), job(options={"fp8_dpa": True})),
    (
        "FP8-ATT-002",
        job("tensorwise", options={"fp8_dpa": True}, hardware=H100),
        job("tensorwise", options={"fp8_dpa": True}),
    ),
    (
        "FP8-ATT-003",
        job("delayed", options={"fp8_dpa": True}, hardware=RTX),
        job("delayed", options={"fp8_dpa": True}),
    ),
    (
        "FP8-ATT-004",
        job(options={"fp8_dpa": True}, model=dataclasses.replace(MODEL, packing_multiple=64)),
        job("delayed", options={"fp8_dpa": True}, model=dataclasses.replace(MODEL, packing_multiple=64)),
    ),
    ("FP8-ATT-005", job(options={"fp8_dpa": True}), job("delayed", options={"fp8_dpa": True})),
    (
        "FP8-NUM-001",
        job(options={"fp8_format": "hybrid"}),
        job("tensorwise", options={"fp8_format": "hybrid"}),
    ),
    (
        "FP8-NUM-002",
        job("blockwise", options={"w_block_scaling_dim": 1, "grad_block_scaling_dim": 2}),
        job("blockwise", options={"w_block_scaling_dim": 1}),
    ),
    (
        "FP8-NUM-003",
        job("delayed", options={"amax_history_len": 1}),
        job("delayed", options={"amax_history_len": 16}),
    ),
    ("FP8-NUM-003", job("delayed", options={"amax_compute_algo": "most_recent"}), job("delayed")),
    ("FP8-PAR-001", job(parallel=Parallel(pp=3)), job(parallel=Parallel(pp=2))),
    ("FP8-PAR-001", job(parallel=Parallel(tp=16)), job(parallel=Parallel(tp=4))),
    # several ranks share a group of keys and values since Megatron-Core 0.16
    (
        "FP8-PAR-001",
        job("tensorwise", parallel=Parallel(tp=8), megatron_core_version="0.15.3"),
        job("tensorwise", parallel=Parallel(tp=8), megatron_core_version="0.16.1"),
    ),
    (
        "FP8-PAR-001",
        job(
            "bf16",
            model=dataclasses.replace(MODEL, num_attention_heads=12, num_query_groups=4, kv_channels=32),
            parallel=Parallel(tp=6),
        ),
        job(
            "bf16",
            model=dataclasses.replace(MODEL, num_attention_heads=12, num_query_groups=4, kv_channels=32),
            parallel=Parallel(tp=4),
        ),
    ),
    ("FP8-PAR-002", job(parallel=Parallel(ep=2)), job()),
    (
        "FP8-PLC-001",
        job(options={"num_layers_at_end_in_bf16": 3}, parallel=Parallel(pp=4)),
        job(options={"num_layers_at_end_in_bf16": 2}, parallel=Parallel(pp=4)),
    ),
    (
        "FP8-PLC-002",
        job(options={"num_layers_at_start_in_bf16": 4, "num_layers_at_end_in_bf16": 4}),
        job(options={"num_layers_at_start_in_bf16": 4, "num_layers_at_end_in_bf16": 3}),
    ),
    (
        "FP8-SHP-002",
        job(
            "blockwise",
            parallel=Parallel(tp=4, sequence=True),
            model=dataclasses.replace(MODEL, seq_length=64),
        ),
        job("blockwise", parallel=Parallel(tp=4, sequence=True)),
    ),
    (
        "FP8-SHP-003",
        job(model=dataclasses.replace(MODEL, vocab_size=250, make_vocab_size_divisible_by=128)),
        job(model=dataclasses.replace(MODEL, make_vocab_size_divisible_by=128)),
    ),
    (
        "FP8-VER-001",
        job(options={"enable_2d_quantization": True}, te_version="2.18.0"),
        job(options={"enable_2d_quantization": True}),
    ),
    ("FP8-VER-001", job("nvfp4", te_version="2.7.0"), job("nvfp4", te_version="2.8.0")),
    ("FP8-VER-002", job(te_version=None), job()),
    ("FP8-VER-003", job(megatron_core_version="0.11.0"), job(megatron_core_version="0.12.0")),
    (
        "FP8-VER-003",
        job("nvfp4", megatron_core_version="0.14.1"),
        job("nvfp4", megatron_core_version="0.15.0"),
    ),
    (
        "FP8-VER-003",
        job(megatron=offload("core_attn"), megatron_core_version="0.15.3"),
        job(megatron=offload("core_attn"), megatron_core_version="0.16.1"),
    ),
    (
        "FP8-VER-004",
        job(nemo_version="2.7.3", megatron_core_version="0.16.1"),
        job(nemo_version="2.7.3", megatron_core_version="0.15.3"),
    ),
    (
        "FP8-VER-004",
        job(bridge_version="0.6.2", megatron_core_version="0.16.1"),
        job(bridge_version="0.6.2", megatron_core_version="0.19.2"),
    ),
    ("FP8-VER-005", job(nemo_version="3.0.0"), job(nemo_version="2.7.3")),
    ("FP8-VER-006", job(python_version="3.10.4"), job(python_version="3.11.2")),
    (
        "FP8-VER-006",
        job(python_version="3.11.2", bridge_version="0.6.2"),
        job(python_version="3.12.1", bridge_version="0.6.2"),
    ),
    ("FP8-VER-007", job(te_version="2.5"), job(te_version="2.6")),
    (
        "FP8-VER-008",
        job("tensorwise", te_version="2.8", megatron_core_version="0.16.1"),
        job("tensorwise", te_version="2.9", megatron_core_version="0.16.1"),
    ),
    (
        "FP8-ENV-001",
        job("blockwise", environment={"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1"}),
        job("blockwise", environment={"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "0"}),
    ),
    (
        "FP8-ENV-001",
        job("tensorwise", environment={"NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES": "1"}),
        job(
            "tensorwise",
            environment={"NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES": "1"},
            options={"use_power_2_scales": True},
        ),
    ),
    ("FP8-ENV-001", job(environment={"NVTE_BACKWARD_OVERRIDE": "dequantized"}), job(environment={})),
    (
        "FP8-ENV-002",
        job(options={"fp8_dpa": True}, environment={"NVTE_DPA_FP8_RECIPE": "F16"}),
        job(environment={"NVTE_DPA_FP8_RECIPE": "F16"}),
    ),
    (
        "FP8-ENV-003",
        job("delayed", environment={"NVTE_UNFUSED_FP8_UPDATE": "1"}),
        job("mxfp8", environment={"NVTE_UNFUSED_FP8_UPDATE": "1"}),
    ),
    (
        "FP8-MIX-001",
        job("delayed", megatron=selective("core_attn", "layernorm")),
        job("tensorwise", megatron=selective("layernorm")),
    ),
    (
        "FP8-MIX-001",
        job("delayed", megatron=selective("layernorm")),
        job("delayed", megatron={"recompute_modules": ("layernorm",)}),  # not asked for
    ),
    (
        "FP8-MIX-001",
        job("delayed", megatron=offload("expert_fc1"), model=EXPERTS),
        job("delayed", megatron=offload("qkv_linear"), model=EXPERTS),
    ),
    ("FP8-RCP-001", job(megatron={"recompute_granularity": "full"}), job(megatron=FULL)),
    ("FP8-RCP-001", job(megatron=FULL | {"recompute_method": None}), job(megatron=FULL)),
    (
        "FP8-RCP-001",
        job(megatron=selective("mlp") | {"recompute_num_layers": 1}),
        job(megatron=selective("mlp")),
    ),
    (
        "FP8-RCP-001",
        job(megatron=selective("moe_act") | {"moe_grouped_gemm": False}),
        job(megatron=selective("moe_act")),
    ),
    ("FP8-RCP-001", job(megatron=selective("mla_up_proj")), job(megatron=selective("core_attn"))),
    (
        "FP8-RCP-002",
        job(megatron=selective("layernorm"), te_version="2.5"),
        job(megatron=selective("layernorm"), te_version="2.6"),
    ),
    ("FP8-RCP-003", job(megatron=offload()), job(megatron=offload("core_attn"))),
    ("FP8-RCP-003", job(megatron=offload("attn_proj")), job(megatron=offload("attn_proj", "core_attn"))),
    (
        "FP8-GRF-001",
        job(megatron=graphs("full_iteration", impl="transformer_engine")),
        job(megatron=graphs("full_iteration")),
    ),
    (
        "FP8-GRF-001",
        job(megatron=graphs("moe_preprocess", impl="transformer_engine"), model=EXPERTS),
        job(megatron=graphs("moe_preprocess"), model=EXPERTS),
    ),
    ("FP8-GRF-001", job(megatron=graphs("moe_router")), job(megatron=graphs("moe_router"), model=EXPERTS)),
    ("FP8-GRF-001", job(megatron=graphs("moe"), model=EXPERTS), job(megatron=graphs("attn"), model=EXPERTS)),
    ("FP8-GRF-002", job(megatron=graphs() | FULL), job(megatron=graphs("full_iteration") | FULL)),
    (
        "FP8-GRF-002",
        job(megatron=graphs() | selective("core_attn"), attention_dropout=0.1),
        job(megatron=graphs() | selective("core_attn")),
    ),
    (
        "FP8-GRF-002",
        job(
            megatron=graphs("moe_router", impl="transformer_engine") | selective("moe"),
            model=EXPERTS,
        ),
        job(megatron=graphs("moe_router") | selective("moe"), model=EXPERTS),
    ),
    ("FP8-GRF-003", job(megatron=graphs(), telemetry=True), job(megatron=graphs())),
    ("FP8-GRF-004", job(megatron=graphs(), scheduled=True), job(scheduled=True)),
    (
        "FP8-GRF-005",
        job(megatron=graphs(impl="transformer_engine"), environment=SEGMENTS),
        job(
            megatron=graphs(impl="transformer_engine"),
            environment=SEGMENTS | {"NCCL_GRAPH_REGISTER": "0"},
        ),
    ),
    ("FP8-OVL-001", job(megatron=OVERLAP), job(megatron=OVERLAP, parallel=SEQUENCE)),
    (
        "FP8-OVL-002",
        job(megatron=OVERLAP, parallel=SEQUENCE, options=ENDS, te_version="2.7"),
        job(megatron=OVERLAP, parallel=SEQUENCE, options=ENDS, te_version="2.8"),
    ),
    (
        "FP8-OVL-002",
        job(megatron=OVERLAP, parallel=SEQUENCE, options=ENDS, nemo_version="2.7.3"),
        job(megatron=OVERLAP, parallel=SEQUENCE, nemo_version="2.7.3"),
    ),
    ("FP8-OVL-002", job(megatron=OVERLAP, parallel=SEQUENCE, scheduled=True), job(scheduled=True)),
    (
        "FP8-GTH-001",
        job("blockwise", options={"fp8_param": True}, distributed_optimizer=False),
        job("blockwise", options={"fp8_param": True}, distributed_optimizer=True),
    ),
    ("FP8-GTH-002", job(megatron=REUSE), job(megatron=REUSE, options={"fp8_param": True})),
    ("FP8-GTH-002", job("blockwise", megatron=REUSE, options={"fp8_param": True}), job("blockwise")),
    (
        "FP8-GTH-003",
        job(options={"fp8_param": True}, distributed_optimizer=True),
        job(options={"fp8_param": True}, distributed_optimizer=True, megatron=REUSE),
    ),
    (
        "FP8-GTH-003",
        job(options={"fp8_param": True}, distributed_optimizer=True),
        job(options={"fp8_param": True}),  # a recipe alone: whose optimizer is not known
    ),
    (
        "FP8-MOE-001",
        job(model=EXPERTS, megatron=PADDING | {"moe_token_dispatcher_type": "allgather"}),
        job(model=EXPERTS, megatron=PADDING),
    ),
    ("FP8-MOE-001", job("bf16", model=EXPERTS, megatron=PADDING), job("bf16", model=EXPERTS)),
    ("FP8-MOE-002", job(model=EXPERTS, te_version="1.10"), job(model=EXPERTS)),
    (
        "FP8-MOE-003",
        job(model=dataclasses.replace(EXPERTS, micro_batch_size=1)),
        job(model=dataclasses.replace(EXPERTS, micro_batch_size=64)),
    ),
    (
        "FP8-AMX-001",
        job("delayed", options={"reduce_amax": False}, parallel=Parallel(cp=2)),
        job("delayed", parallel=Parallel(cp=2)),
    ),
    ("FP8-AMX-001", job("delayed", options={"tp_only_amax_red": True}), job("delayed")),
    ("FP8-CFG-001", job(megatron_refusal="fp8_param must be used together with fp8 mode."), job()),
    ("FP8-MIX-002", job("delayed", options={"amax_compute_algo": "my.module:amax"}), job("delayed")),
]


@pytest.mark.parametrize(("code", "bad", "good"), FOUND)
def test_found_where_it_is_and_not_beside_it(code, bad, good):
    assert code in codes(bad)
    assert code not in codes(good)


def test_every_rule_is_tested_here():
    assert {code for code, _, _ in FOUND} | {"FP8-HW-001", "FP8-SHP-001"} == set(preflight.all_rules())


def test_a_missing_te_is_lighter_for_a_job_that_runs_elsewhere():
    assert only(job(te_version=None)).severity == "error"
    assert only(job(te_version=None, runs_here=False)).severity == "warning"


def test_findings_come_worst_first():
    found = preflight.check(
        job(
            "mxfp8",
            hardware=H100,
            options={"fp8_format": "hybrid"},
            environment={"NVTE_BACKWARD_OVERRIDE": "x"},
        )
    )
    assert [finding.severity for finding in found] == ["error", "warning", "warning"]


def test_require_raises_for_errors_only():
    preflight.require(preflight.check(job(options={"fp8_format": "hybrid"})))
    with pytest.raises(PreflightError, match=r"\[FP8-HW-001\].*blockwise") as caught:
        preflight.require(preflight.check(job(hardware=H100)))
    assert [finding.code for finding in caught.value.findings] == ["FP8-HW-001"]


def test_posing_devices():
    posing = {name: preflight.posing_device(recipes.load(name), "auto") for name in recipes.names()}
    assert posing == dict.fromkeys(recipes.names(), "h100") | {"mxfp8": "b200", "nvfp4": "b200"}
    assert preflight.posing_device(recipes.load("mxfp8"), "gb200") == "gb200"


def test_a_composed_job():
    found = preflight.check_job(config.compose(["hardware=h100"]), {}, emulated=True)
    assert [finding.code for finding in found] == ["FP8-HW-001"]
    assert preflight.check_job(config.compose(), {}, emulated=True) == []


def test_ignoring_makes_it_lighter_and_says_so():
    composed = config.compose(["hardware=h100", "preflight.ignore=[FP8-HW-001]"])
    (finding,) = preflight.check_job(composed, {}, emulated=True)
    assert finding.severity == "info"
    assert finding.message.startswith("Ignored")
    preflight.require([finding])


def test_ignoring_a_code_that_does_not_exist():
    with pytest.raises(ConfigError, match="Did you mean 'FP8-HW-001'"):
        preflight.check_job(config.compose(["preflight.ignore=[FP8-HW-01]"]), {}, emulated=True)


def test_the_gpu_found_takes_the_place_of_auto():
    found = Hardware(name="auto", display_name="NVIDIA H100 80GB HBM3", capability=(9, 0))
    (finding,) = preflight.check_job(config.compose(), {}, emulated=False, found=found)
    assert finding.code == "FP8-HW-001"
    assert "NVIDIA H100 80GB HBM3" in finding.message


@pytest.mark.parametrize(
    ("torch", "cuda"),
    [
        ("2.9.0+cu128", (12, 8)),
        ("2.9.0+cu130", (13, 0)),
        ("2.13.0+cpu", None),
        ("2.9.0a0+nv25.10", None),
        (None, None),
    ],
)
def test_cuda_as_torchs_version_says(torch, cuda):
    from nemo_fp8_recipes.preflight.job import _cuda_version

    assert _cuda_version(torch) == cuda


@pytest.mark.parametrize(("te_version", "severity"), [("2.11.0", "error"), ("2.14.1", "warning")])
def test_releases_before_2_14_refuse_to_gather_partial_blocks(te_version, severity):
    given = job(
        "blockwise",
        parallel=Parallel(tp=4, sequence=True),
        model=dataclasses.replace(MODEL, seq_length=64),
        te_version=te_version,
    )
    (finding,) = [finding for finding in preflight.check(given) if finding.code == "FP8-SHP-002"]
    assert finding.severity == severity
    assert ("refuses" in finding.message) == (severity == "error")


def test_the_emulated_engines_are_those_of_the_binding():
    from nemo_fp8_recipes.emulation.binding.releases import RELEASES
    from nemo_fp8_recipes.preflight.rules.device import EMULATED_ENGINES

    assert tuple(RELEASES) == EMULATED_ENGINES


def test_every_recipe_of_a_schedule_is_checked():
    spans = "recipe_schedule=[{recipe: mxfp8, from_step: 50%}]"
    composed = config.compose(["fp8_recipe=blockwise", "hardware=h100", spans])
    (finding,) = preflight.check_job(composed, {}, emulated=False, runs_here=False)
    assert finding.severity == "error"
    assert finding.message.startswith("In recipe_schedule, mxfp8: ")
    composed = config.compose(["fp8_recipe=blockwise", "hardware=auto", spans])
    assert preflight.job_input(composed, {}, emulated=True).hardware.name == "b200"


@pytest.mark.parametrize("given", ["nemotron4_340b", "nemotron3_super_120b_a12b"])
def test_all_gpus_at_once_are_each_gpu_by_itself(given):
    composed = config.compose([f"model={given}", "parallel=published", "megatron.tp_comm_overlap=true"])
    base = preflight.job_input(composed, {}, emulated=False)
    gpus = [preflight.named_hardware(name) for name in config.options("hardware")]
    for name in (*recipes.names(), *recipes.presets()):
        one = dataclasses.replace(base, recipe=recipes.load(name))
        by_gpu = preflight.check_on(one, gpus)
        assert by_gpu == {gpu.name: preflight.check(dataclasses.replace(one, hardware=gpu)) for gpu in gpus}
