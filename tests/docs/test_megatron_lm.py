"""docs/megatron_lm.md: bash runs its lines, and its two lines of Python are the hook."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_fp8_recipes import recipes
from nemo_fp8_recipes.targets import megatron_lm
from nemo_fp8_recipes.targets.megatron_lm.options import changed
from tests.callbacks.test_megatron_lm import MegatronLm, started
from tests.report.runs import make
from tests.support.markdown import blocks
from tests.support.processes import environment

# What stands in for torchrun: it writes down the words and the variables it was given.
TORCHRUN = f"""#!{sys.executable}
import json, os, sys
with open("torchrun.jsonl", "a") as file:
    file.write(json.dumps({{"words": sys.argv[1:], "recipe": os.environ.get("NEMO_FP8_RECIPE")}}) + "\\n")
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_runs_every_line(tmp_path: Path) -> None:
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    (bin_directory / "torchrun").write_text(TORCHRUN)
    (bin_directory / "nemo-fp8").write_text(f'#!/bin/sh\nexec {sys.executable} -m nemo_fp8_recipes "$@"\n')
    for program in bin_directory.iterdir():
        program.chmod(0o755)
    make(tmp_path / "checkpoints" / "fp8")  # what the hook would have left for `nemo-fp8 report`
    script = "".join(block.code for block in blocks("megatron_lm.md") if block.language == "sh")
    env = environment()
    env["PATH"] = f"{bin_directory}:{env['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    first, second = [json.loads(line) for line in (tmp_path / "torchrun.jsonl").read_text().splitlines()]
    assert "--fp8-recipe mxfp8" in " ".join(first["words"])
    assert first["words"][-4:] == ["--num-layers", "32", "--hidden-size", "4096"]
    assert megatron_lm.read({"NEMO_FP8_RECIPE": first["recipe"]}) == recipes.load("mxfp8")
    expected = recipes.load("delayed", reduce_amax=False)
    assert megatron_lm.read({"NEMO_FP8_RECIPE": second["recipe"]}) == expected
    assert "--fp8-recipe delayed" in " ".join(second["words"])
    assert "--fp8-quantizer-factory nemo_fp8_recipes.targets.megatron_lm.blockwise" in done.stdout
    assert "linear_fc2" in (tmp_path / "precision.yaml").read_text()


def test_the_two_lines_are_the_hook(emulated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = [block for block in blocks("megatron_lm.md") if block.language == "python"]
    assert len(block.code.split("\n\n")) == len([line for line in block.code.splitlines() if line]) == 2
    args, environ = started(recipes.load("mxfp8"), tmp_path)
    training = MegatronLm(args)
    own = training.train_step
    monkeypatch.setitem(sys.modules, "megatron.training.training", training)
    monkeypatch.setenv("NEMO_FP8_RECIPE", environ["NEMO_FP8_RECIPE"])
    exec(compile(block.code, "docs/megatron_lm.md", "exec"), {})
    assert training.train_step is not own


def test_the_table_of_the_page_is_what_the_code_does() -> None:
    from tests.targets.test_megatron_lm import CASES

    text = (Path(__file__).resolve().parents[2] / "docs" / "megatron_lm.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|") and "carried by" not in line]
    carried = {"factory": "factory", "injection": "the hook", "nothing": "nothing: refused"}
    for options in CASES.values():
        for option, (_, by) in options.items():
            if by not in carried:
                continue
            stem = next(
                stem
                for stem in (option, "fp8_quant_*", "*_block_scaling_dim", "fp8_gemm_*", "functions for")
                if (stem == option and f"`{option}`" in text)
                or (
                    "*" in stem
                    and (
                        option.startswith(stem.rstrip("*"))
                        if stem.endswith("*")
                        else option.endswith(stem[1:])
                    )
                )
                or (stem == "functions for" and option.endswith("_algo"))
            )
            shown = stem if stem == "functions for" else f"`{stem}`"
            assert any(shown in row.split("|")[1] and carried[by] in row.split("|")[2] for row in rows), (
                option
            )
    assert changed(recipes.load("mxfp8")) == {}
