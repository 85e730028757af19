"""`nemo-fp8 args` as a user types it: what bash makes of it, and without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from nemo_fp8_recipes import recipes
from nemo_fp8_recipes.cli import main
from nemo_fp8_recipes.targets import megatron_lm
from tests.support.processes import environment, run_python

OVERRIDES = [
    "fp8_recipe=tensorwise",
    "fp8_recipe.amax_epsilon=1e-6",
    "fp8_recipe.fp8_quant_fwd_inp.power_2_scale=true",
    "fp8_recipe.num_layers_at_end_in_bf16=2",
]


def run_args(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["args", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_gets_the_flags_and_variables_that_json_says(capsys: pytest.CaptureFixture[str]) -> None:
    said = json.loads(run_args(capsys, *OVERRIDES, "--json"))
    text = run_args(capsys, *OVERRIDES)
    # What the shell inherited is overridden; the words arrive one by one.
    script = (
        'export NVTE_BACKWARD_OVERRIDE=dequantized\neval "$1"\nenv -0\nprintf "%s\\0" "${NEMO_FP8_ARGS[@]}"'
    )
    done = subprocess.run(
        ["bash", "-euc", script, "bash", text], env=environment(), capture_output=True, text=True, check=True
    )
    words = done.stdout.rstrip("\0").split("\0")
    assert words[-len(said["flags"]) :] == said["flags"]
    seen = dict(word.split("=", 1) for word in words[: -len(said["flags"])])
    for name, value in said["environment"].items():
        assert seen.get(name) == value
    assert said["environment"]["NVTE_BACKWARD_OVERRIDE"] is None
    expected = recipes.load(
        "tensorwise",
        amax_epsilon=1e-6,
        fp8_quant_fwd_inp={"power_2_scale": True},
        num_layers_at_end_in_bf16=2,
    )
    assert megatron_lm.read(seen) == expected
    assert said["route"] == "factory"


def test_text_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    made = megatron_lm.Settings(
        "flags", ("--x", "a b; $(touch /tmp/x)"), {"A": "it's `id`"}, ("one\ntwo; rm -rf",)
    )
    assert made.shell().splitlines() == [
        "# one two; rm -rf",
        "export A='it'\"'\"'s `id`'",
        "NEMO_FP8_ARGS=(--x 'a b; $(touch /tmp/x)')",
    ]


def test_names_of_other_tools_are_said_what_they_became(capsys: pytest.CaptureFixture[str]) -> None:
    said = run_args(capsys, "fp8_recipe=fp8_mx")
    assert "fp8_mx is Megatron-Bridge" in said
    assert "--fp8-recipe mxfp8" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fp8_recipe=delayed", "fp8_recipe.reduce_amax=false"], "fp8_recipe.reduce_amax=false"),
        (["fp8_recipe=delayed", "--factory"], "--fp8-amax-history-len"),
        (["--hook", "--factory"], "not both"),
        (["--module", "*fc1=bf16"], "needs --precision-config"),
        (["--precision-config", "x.yaml"], "needs --module"),
        (["--module"], "needs a value"),
        (["recipe_schedule=[{recipe: bf16, to_step: 5}]"], "one recipe from the first step"),
        (["recipe_modules=[{modules: '*fc2', recipe: bf16}]"], "Give each as --module"),
        (["--josn"], "Did you mean '--json'?"),
        (
            [
                "fp8_recipe=mxfp8",
                "fp8_recipe.enable_2d_quantization=true",
                "model=nemotron3_nano_30b_a3b",
            ],
            "pads an expert's tokens",
        ),
        (["--module", "*=bf16", "--precision-config", "nowhere/x.yaml"], "there is no directory"),
    ],
)
def test_errors_are_one_sentence_and_print_no_settings(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["args", *arguments]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""


def test_a_file_that_holds_something_else_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "precision.yaml"
    there.write_bytes(b"\xff\xfe no text")
    arguments = ["--module", "*fc2=bf16", "--precision-config", str(there)]
    assert main(["args", "fp8_recipe=mxfp8", *arguments]) == 2
    assert "exists and holds something else" in capsys.readouterr().err
    assert there.read_bytes() == b"\xff\xfe no text"


def test_no_torch_is_imported() -> None:
    run_python(
        """
        import sys
        from nemo_fp8_recipes.cli import main
        assert main(["args", "fp8_recipe=blockwise", "fp8_recipe.w_block_scaling_dim=1"]) == 0
        assert not {"torch", "transformer_engine", "megatron"} & set(sys.modules)
        """
    )
