"""Shared by the tests of launching."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.launch import slurm_cluster
from tests.launch.slurm_jobs import LONG, losses

HOSTILE = {
    "space": "two  words ",
    "single quote": "it's",
    "double quote": 'say "hi"',
    "newline": "one\ntwo",
    "substitution": "$(touch INJECTED)",
    "backticks": "`touch INJECTED`",
    "semicolon": "; touch INJECTED #",
    "variable": "${HOME} $HOME",
    "backslash": "back\\slash\\",
    "quotes and backslashes": "\\'\\\"'\"'",
    "glob and braces": "* ? [a] {a,b} ~",
    "redirection": "> INJECTED < /dev/null | cat &",
    "comment": "#not a comment",
    "not ASCII": "größe λ",
}
"""Values that a shell, Hydra or SLURM would misread when they are not quoted; those that hold a command would
leave a file INJECTED behind where it ran."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slurm: needs SLURM and root; a stage of its own, -m slurm")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run what needs SLURM only when it is asked for: it takes ten minutes and the machine to itself."""
    if "slurm" in config.getoption("markexpr"):
        return
    for item in items:
        if item.get_closest_marker("slurm"):
            item.add_marker(pytest.mark.skip(reason="a stage of its own: python -m pytest -m slurm"))


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's own directory as the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


Launch = Callable[..., "subprocess.CompletedProcess[str]"]


def nemo_fp8(*words: str) -> list[str]:
    """The command line of `nemo-fp8` with this interpreter."""
    return [sys.executable, "-m", "nemo_fp8_recipes", *words]


def clean_environment() -> dict[str, str]:
    """The environment without what a launcher around the tests may have set."""
    prefixes = ("SLURM_", "SBATCH_", "NEMO_FP8_", "TORCHELASTIC_", "NVTE_")
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith(prefixes)},
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def launch(in_tmp: Path) -> Launch:
    """Run `nemo-fp8 launch` in the test's directory to its end."""

    def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            nemo_fp8("launch", *words),
            cwd=in_tmp,
            env={**clean_environment(), **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm_cluster.Cluster]:
    """A SLURM cluster of two nodes; skipped, saying why, where there can be none."""
    reason = slurm_cluster.why_not()
    if reason is not None:
        pytest.skip(reason)
    with slurm_cluster.start(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of the job below, run here from its first step to its last."""
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = subprocess.run(
        nemo_fp8("train", "device=emulated", f"run_dir={run_dir}", *LONG),
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return losses(run_dir)
