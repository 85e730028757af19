"""Every finding: the job that has it, and its neighbour that has not."""

import dataclasses

import pytest

from nemo_fp8_recipes import config, preflight, recipes
from nemo_fp8_recipes.errors import ConfigError, PreflightError
from nemo_fp8_recipes.preflight import Finding, Hardware, ModelShape, Parallel, PreflightInput

H100 = Hardware(name="h100", display_name="H100", capability=(9, 0))
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


def job(
    recipe="mxfp8", *, hardware=B200, model=MODEL, parallel=None, options=None, **changes
) -> PreflightInput:
    return PreflightInput(
        recipe=recipes.load(recipe, **(options or {})),
        hardware=hardware,
        model=model,
        parallel=parallel or Parallel(),
        te_version=changes.pop("te_version", "2.20.2"),
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
    (
        "FP8-EMU-001",
        job("nvfp4", options={"nvfp4_4over6": "weights"}, emulated=True),
        job("nvfp4", options={"nvfp4_4over6": "weights"}),
    ),
    (
        "FP8-EMU-001",
        job("nvfp4", options={"nvfp4_4over6": "weights"}, emulated=True),
        job("nvfp4", emulated=True),
    ),
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
    ("FP8-PAR-001", job(parallel=Parallel(tp=8)), job(parallel=Parallel(tp=4))),
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
        "FP8-VER-001",
        job(options={"enable_2d_quantization": True}, te_version="2.18.0"),
        job(options={"enable_2d_quantization": True}),
    ),
    ("FP8-VER-001", job("nvfp4", te_version="2.7.0"), job("nvfp4", te_version="2.8.0")),
    ("FP8-VER-002", job(te_version=None), job()),
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
        job("delayed", recompute_modules=("core_attn", "layernorm")),
        job("tensorwise", recompute_modules=("layernorm",)),
    ),
    (
        "FP8-MIX-001",
        job("delayed", offload_modules=("expert_fc1",)),
        job("delayed", offload_modules=("qkv",)),
    ),
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


def test_every_recipe_of_a_schedule_is_checked():
    spans = "recipe_schedule=[{recipe: mxfp8, from_step: 50%}]"
    composed = config.compose(["fp8_recipe=blockwise", "hardware=h100", spans])
    (finding,) = preflight.check_job(composed, {}, emulated=False, runs_here=False)
    assert finding.severity == "error"
    assert finding.message.startswith("In recipe_schedule, mxfp8: ")
    composed = config.compose(["fp8_recipe=blockwise", "hardware=auto", spans])
    assert preflight.job_input(composed, {}, emulated=True).hardware.name == "b200"
