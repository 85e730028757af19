"""`nemo-fp8 show` and `nemo-fp8 doctor` as a user runs them."""

import json

import pytest

from nemo_fp8_recipes import recipes
from nemo_fp8_recipes.cli import main
from tests.support.processes import run_python


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "NVTE_BACKWARD_OVERRIDE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "120")


def run(capsys, *arguments):
    status = main(list(arguments))
    return status, capsys.readouterr()


@pytest.mark.parametrize("name", recipes.names())
def test_show_json_is_the_recipe(capsys, name):
    status, out = run(capsys, "show", f"fp8_recipe={name}", "--json")
    shown = json.loads(out.out)
    recipe = recipes.load(name)
    assert status == 0
    assert recipes.load(shown["recipe"]) == recipe
    assert shown["megatron"] == recipe.megatron()
    assert shown["te"]["class"] == recipe.te_class
    assert set(shown["operands"]) == set(recipe.operands())


def test_show_json_has_the_options_in_effect(capsys):
    _, out = run(capsys, "show", "fp8_recipe=blockwise", "fp8_recipe.use_f32_scales=true", "--json")
    options = json.loads(out.out)["te"]["options"]
    assert options["fp8_quant_fwd_weight"] == {"power_2_scale": False, "amax_epsilon": 0.0}
    assert options["fp8_format"] == "E4M3"


def test_show_prints_all_four_parts(capsys):
    status, out = run(capsys, "show", "fp8_recipe=cs", "fp8_recipe.amax_epsilon=1e-5")
    assert status == 0
    for part in (
        "NeMo 2's name for tensorwise",
        "use_power_2_scales: false",
        "Float8CurrentScaling",
        "amax_epsilon=1e-05",
        "first_last_layers_bf16",
        "Megatron has no field for amax_epsilon",
        "grad_output",
        "e5m2",
    ):
        assert part in out.out


def test_show_of_bf16(capsys):
    status, out = run(capsys, "show", "fp8_recipe=bf16")
    assert status == 0
    assert "autocast is off" in out.out


def test_show_imports_no_torch():
    run_python(
        """
        import sys
        from nemo_fp8_recipes.cli import main
        assert main(["show", "fp8_recipe=mxfp8"]) == 0
        assert main(["show", "fp8_recipe=mxfp8", "--json"]) == 0
        assert main(["doctor", "fp8_recipe=mxfp8", "device=emulated"]) == 0
        assert main(["doctor", "--all", "device=emulated"]) == 0
        assert not {"torch", "numpy", "transformer_engine", "megatron"} & set(sys.modules)
        """
    )


@pytest.mark.parametrize("command", ["show", "doctor"])
def test_help_has_an_example(capsys, command):
    status, out = run(capsys, command, "--help")
    assert status == 0
    assert f"nemo-fp8 {command} fp8_recipe=" in out.out


@pytest.mark.parametrize("command", ["show", "doctor"])
@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("fp8_recipe=mxpf8", "Did you mean 'mxfp8'?"),
        ("--jsn", "Did you mean '--json'?"),
        ("x=1", "no key 'x'"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(capsys, command, argument, said):
    status, out = run(capsys, command, argument)
    assert status == 2
    assert out.out == ""
    assert said in out.err
    assert out.err.count("\n") == 1


def test_doctor_refuses_and_names_what_runs(capsys):
    status, out = run(capsys, "doctor", "fp8_recipe=mxfp8", "hardware=h100", "device=native")
    assert status == 2
    assert "FP8-HW-001" in out.out
    assert "bf16, delayed, tensorwise, blockwise" in out.out


def test_doctor_of_a_sound_job(capsys):
    status, out = run(capsys, "doctor", "fp8_recipe=blockwise", "hardware=h100", "device=emulated")
    assert status == 0
    assert "Nothing found" in out.out
    assert "of the GEMM work is quantised" in out.out


def test_doctor_of_every_recipe_on_every_gpu(capsys):
    status, out = run(
        capsys, "doctor", "--all", "--json", "model=nemotron_h_8b", "device=native", "parallel.tp=8"
    )
    found = json.loads(out.out)["matrix"]
    assert status == 0
    assert set(found) == {*recipes.names(), *recipes.presets()}
    assert found["tensorwise"]["h100"] == []
    assert found["mxfp8"]["h100"] == ["FP8-HW-001", "FP8-SHP-001"]
    assert found["mxfp8"]["b200"] == ["FP8-SHP-001"]
    assert found["deepseek_v3"]["b200"] == ["FP8-HW-003"]
    assert "HW-001" in run(capsys, "doctor", "--all", "device=native")[1].out


@pytest.mark.parametrize(("version", "status"), [("2.4", 2), ("2.8", 0), ("2.20", 0), ("'2.20.2'", 0)])
def test_doctor_for_a_stated_version(capsys, version, status):
    arguments = ("doctor", "fp8_recipe=nvfp4", "hardware=b200", "device=native", f"versions.te={version}")
    assert run(capsys, *arguments)[0] == status


def test_doctor_strict_counts_warnings(capsys):
    arguments = ("doctor", "fp8_recipe.fp8_format=hybrid", "hardware=b200", "device=emulated")
    assert run(capsys, *arguments)[0] == 0
    status, out = run(capsys, *arguments, "--strict")
    assert status == 1
    assert "1 warning." in out.out


def test_doctor_json(capsys):
    status, out = run(
        capsys, "doctor", "hardware=h100", "fp8_recipe.fp8_format=hybrid", "device=emulated", "--json"
    )
    said = json.loads(out.out)
    assert status == 2
    assert 0 < said["cost"]["quantised_share"] < 1
    assert [finding["code"] for finding in said["findings"]] == ["FP8-HW-001", "FP8-NUM-001"]
    assert said["findings"][0]["severity"] == "error"
    assert said["emulated"] is True


def test_doctor_of_an_option_that_is_not_emulated(capsys):
    option = "fp8_recipe.fp8_dpa=true"
    status, out = run(capsys, "doctor", "fp8_recipe=delayed", option, "device=emulated")
    assert status == 2
    assert "not emulated" in " ".join(out.out.split())
    _, elsewhere = run(capsys, "doctor", "fp8_recipe=delayed", option, "device=native", "hardware=b200")
    assert "not emulated" not in " ".join(elsewhere.out.split())
    assert run(capsys, "doctor", "fp8_recipe=delayed", "device=emulated")[0] == 0
    four_over_six = "fp8_recipe.nvfp4_4over6=weights"
    assert run(capsys, "doctor", "fp8_recipe=nvfp4", four_over_six, "device=emulated")[0] == 0


def test_doctor_counts_modules_with_another_recipe(capsys):
    words = ["doctor", "fp8_recipe=mxfp8", "hardware=b200", "device=emulated"]
    spent = {}
    for modules in ("[]", '[{modules: "*linear_fc2", recipe: bf16}]', '[{modules: "*", recipe: bf16}]'):
        _, out = run(capsys, *words, f"recipe_modules={modules}", "--json")
        spent[modules] = json.loads(out.out)["cost"]["quantised_share"]
    most, some, none = spent.values()
    assert most > some > none == 0


@pytest.mark.parametrize(("main_recipe", "of_module"), [("mxfp8", "delayed"), ("delayed", "mxfp8")])
def test_doctor_refuses_modules_that_the_job_would_refuse(capsys, main_recipe, of_module):
    modules = f'recipe_modules=[{{modules: "*fc2", recipe: {of_module}}}]'
    status, out = run(capsys, "doctor", f"fp8_recipe={main_recipe}", modules, "hardware=b200")
    assert status == 2
    assert f"recipe_modules *fc2={of_module} is not possible" in out.err


def test_doctor_knows_which_trainers_take_one_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    spans = "recipe_schedule=[{recipe: bf16, to_step: 3}]"
    assert main(["doctor", spans]) == 0
    capsys.readouterr()
    assert main(["doctor", "framework=bridge", spans]) == 2
    assert "framework=bridge trains everything with one recipe" in capsys.readouterr().err
