"""What is typed after `nemo-fp8 launch`, taken apart."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from nemo_fp8_recipes.cli import main
from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.launch.arguments import parse


def test_overrides_and_options_in_any_order() -> None:
    arguments = parse(["--dry-run", "fp8_recipe=mxfp8", "--resume", "launcher=slurm"])
    assert arguments.overrides == ("fp8_recipe=mxfp8", "launcher=slurm")
    assert (arguments.dry_run, arguments.resume, arguments.overwrite) == (True, True, False)
    assert arguments.payload.kind == "train"


def test_what_follows_two_dashes_belongs_to_the_script(in_tmp: Path) -> None:
    (in_tmp / "pretrain.py").write_text("")
    arguments = parse(["fp8_recipe=mxfp8", "--", "pretrain.py", "--resume", "-m", "--", "a b"])
    assert not arguments.resume
    assert not arguments.multirun
    assert arguments.payload.kind == "script"
    assert arguments.payload.target == str(in_tmp / "pretrain.py")
    assert arguments.payload.arguments == ("--resume", "-m", "--", "a b")


def test_a_module_of_the_users() -> None:
    payload = parse(["--", "-m", "my.package", "--x"]).payload
    assert (payload.kind, payload.target, payload.arguments) == ("module", "my.package", ("--x",))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dryrun"], "Did you mean --dry-run?"),
        (["--"], "nothing after --"),
        (["--", "missing.py"], "no script missing.py"),
        (["--", "-m"], "names no module"),
        (["--resume", "--overwrite"], "give one"),
    ],
)
def test_what_cannot_be_meant_is_one_clear_error(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        parse(words)


@pytest.mark.parametrize("launcher", ["local", "torchrun"])
def test_a_module_is_started_and_not_taken_for_a_sweep(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], launcher: str
) -> None:
    (in_tmp / "job.py").write_text("")
    of_job = [f"launcher={launcher}", "hardware=b200", "--dry-run", "--"]
    for words in (["-m", "json.tool", "--sort-keys"], ["job.py", "-m", "x", "--multirun"]):
        assert main(["launch", *of_job, *words]) == 0
        shown = shlex.split(capsys.readouterr().out, comments=True)
        kind, target = ("module", "json.tool") if words[0] == "-m" else ("script", str(in_tmp / "job.py"))
        start = shown.index(kind)
        assert shown[start : start + 2] == [kind, target]
        assert shown[start + 2 :] == words[2 if kind == "module" else 1 :]


@pytest.mark.parametrize("launcher", ["local", "slurm"])
def test_resume_needs_to_know_what_to_resume(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], launcher: str
) -> None:
    assert main(["launch", f"launcher={launcher}", "hardware=b200", "--resume", "--dry-run"]) == 2
    assert "run_dir" in capsys.readouterr().err
    assert (
        main(["launch", f"launcher={launcher}", "hardware=b200", "--resume", "--dry-run", "run_dir=x"]) == 0
    )
