"""The command line's frame: commands, help, errors without tracebacks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_fp8_recipes.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for command in COMMANDS:
        assert f"  {command.name}" in shown
        assert command.summary in shown


@pytest.mark.parametrize("command", [command.name for command in COMMANDS])
def test_every_command_explains_itself_with_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    assert f"nemo-fp8 {command}" in capsys.readouterr().out


def test_an_unknown_command_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    error = capsys.readouterr().err
    assert "Did you mean 'train'?" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("word", ["--debug", "debug=true"])
def test_debug_shows_the_traceback(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "fp8_recipe=mxfp9", word]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "mxfp8" in error.splitlines()[-1]


def test_what_follows_two_dashes_is_left_to_the_users_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("")
    words = ["launch", "launcher=torchrun", "launcher.nproc_per_node=1", "device=emulated", "--dry-run"]
    assert main([*words, "--", "mine.py", "--help", "--debug"]) == 0
    shown = capsys.readouterr().out
    assert "usage: nemo-fp8" not in shown
    assert "mine.py --help --debug" in shown


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformer_engine", "megatron", "pyarrow", "tensorboard", "hydra", "rich")
    code = f"import sys, nemo_fp8_recipes.cli; print(*[m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_output_into_a_closed_pipe_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m nemo_fp8_recipes show fp8_recipe=nvfp4 | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["show", "fp8_recipe=mxfp8"], 0),
        (["show", "--json", "fp8_recipe=mxfp8"], 0),
        (["doctor", "fp8_recipe=mxfp8", "hardware=h100"], 2),
        (["runs"], 0),
    ],
)
def test_a_reader_that_goes_away_does_not_change_the_exit_status(
    words: list[str], status: int, tmp_path: Path
) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "nemo_fp8_recipes", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (status, "")


@pytest.mark.parametrize("words", [["show", "fp8_recipe=mxfp8"], ["args", "fp8_recipe=mxfp8"], ["--help"]])
def test_a_full_disk_under_the_output_is_one_sentence(words: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "nemo_fp8_recipes", *words], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (
        2,
        "nemo-fp8: Cannot write the output: No space left on device.\n",
    )
