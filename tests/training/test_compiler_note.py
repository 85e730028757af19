"""Who waits for the compiler is told so before."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.training.command import train

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_a_first_run_says_that_its_kernels_are_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\nexit 1\n")  # so that the test does not wait: the job goes on without
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("NEMO_FP8_KERNELS", raising=False)
    waiting = "The first step compiles the emulated device's kernels"
    assert waiting in train(tmp_path / "run", "training.steps=1").output
    monkeypatch.setenv("NEMO_FP8_KERNELS", "eager")
    assert waiting not in train(tmp_path / "eager", "training.steps=1").output
