"""Progress on a terminal and in a log; a signal as a wish to stop."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from nemo_fp8_recipes.training import display
from nemo_fp8_recipes.training.interruption import watch_signals
from tests.training.command import TIMEOUT, Run, command, environment


def test_a_terminal_gets_a_bar_with_loss_and_step_time() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120)
    with display.progress(console, total=10, done=4) as line:
        line.update(5, 3.14159, 123.4)
    shown = text.getvalue()
    assert "3.1416" in shown
    assert "123 ms/step" in shown
    assert "5/10" in shown


def test_a_log_gets_few_lines_but_the_first_and_the_last() -> None:
    text = io.StringIO()
    console = Console(file=text, width=120)
    with display.progress(console, total=100, done=0) as line:
        for step in range(1, 101):
            line.update(step, 1.0 / step, 10.0)
    lines = text.getvalue().splitlines()
    assert lines[0] == "step 1/100  loss 1.0000  10 ms/step"
    assert lines[-1] == "step 100/100  loss 0.0100  10 ms/step"
    assert len(lines) < 5


def test_other_ranks_are_silent(capsys) -> None:
    console = display.make_console(quiet=True)
    display.banner(console, {"recipe": "mxfp8"})
    with display.progress(console, total=1, done=0) as line:
        line.update(1, 1.0, 1.0)
    assert capsys.readouterr().out == ""


def test_the_first_signal_is_a_wish_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with watch_signals() as interruption:
        assert interruption.signal is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_second_signal_ends_the_process() -> None:
    program = (
        "import os, signal\n"
        "from nemo_fp8_recipes.training.interruption import watch_signals\n"
        "with watch_signals():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('too late', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGTERM
    assert done.stdout == "still here\n"


SWALLOWED = """
import os, signal, sys, time
from nemo_fp8_recipes.cli import main
from nemo_fp8_recipes.commands import train
from nemo_fp8_recipes.training.interruption import watch_signals

def libraries(*_, **__):
    try:
        print("half-way", flush=True)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(20)
    except BaseException:
        raise AttributeError("module has no attribute") from None

def starting(*_, **__):
    libraries()

def training(*_, **__):
    with watch_signals():
        os.kill(os.getpid(), signal.SIGINT)
        libraries()

signal.signal(signal.SIGINT, signal.default_int_handler)
train.run_job = globals()[sys.argv[1]]
sys.exit(main(["train"]))
"""


@pytest.mark.parametrize("moment", ["starting", "training"])
def test_ctrl_c_is_no_error_of_a_library_that_catches_it(moment: str) -> None:
    """While the job starts, of which imports are the most, and the second one later on."""
    done = subprocess.run(
        [sys.executable, "-c", SWALLOWED, moment],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "half-way\n", "nemo-fp8: interrupted\n")


def test_a_reader_that_goes_away_does_not_end_the_job(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        command(f"run_dir={tmp_path / 'run'}", "fp8_recipe=bf16", "training.steps=2"),
        env=environment(),
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    os.close(write)
    run = Run(done.returncode, "", done.stderr, tmp_path / "run")
    assert run.status == 0, run.errors
    assert run.record["status"] == "finished"
    assert len(run.losses) == 2
