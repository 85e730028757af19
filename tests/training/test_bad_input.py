"""What cannot work ends in one clear line and a non-zero status, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.command import train


@pytest.mark.parametrize(
    ("run_dir", "overrides", "says"),
    [
        ("/proc/run", (), "Cannot write /proc/run"),
        ("run", ("data.path=/nowhere/at/all",), "There is no directory /nowhere/at/all"),
        ("run", ("parallel.tp=2",), "do not divide into parallel.tp=2"),
        ("run", ("fp8_recipe=mxfp8", "hardware=h100"), "FP8-HW-001"),
        ("run", ("fp8_recipe.fp8_dpa=true",), "FP8-EMU-002"),
        ("run", ("training.steps=0",), "training.steps=0"),
    ],
)
def test_one_clear_line(tmp_path: Path, run_dir: str, overrides: tuple[str, ...], says: str) -> None:
    failed = train(tmp_path / run_dir, *overrides, status=2)
    lines = [line for line in failed.errors.splitlines() if line.startswith("nemo-fp8: ")]
    assert len(lines) == 1, failed.errors
    assert says in lines[0]
    assert "Traceback" not in failed.errors
    assert not failed.path.exists()


def test_a_run_that_fails_says_so_in_its_record(tmp_path: Path) -> None:
    failed = train(
        tmp_path / "run", "fp8_recipe=bf16", "optimizer.lr=1e30", "optimizer.clip_grad=0", status=2
    )
    assert "diverged" in failed.errors
    assert failed.record["status"] == "failed"
    assert failed.record["error"].startswith("DivergedError: Step ")
    assert failed.record["ended"]
