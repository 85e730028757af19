"""An environment that lacks a dependency, as one that is older than the dependency does."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from nemo_fp8_recipes.dependencies import REQUIRED, Dependency

ROOT = Path(__file__).parents[1]
OWN_FILES = ("nemo_fp8_recipes", "__editable__", "_nemo_fp8", "_editable")


def test_the_table_is_what_pyproject_declares() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert [one.requirement for one in REQUIRED] == declared


def without(modules: set[str], directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run this Python with every installed package but those: links to each of them, and no site-packages."""
    packages = directory / "packages"
    packages.mkdir()
    for place in map(Path, site.getsitepackages()):
        for entry in place.iterdir():
            if entry.name not in modules and not entry.name.startswith(OWN_FILES):
                (packages / entry.name).symlink_to(entry)
    return subprocess.run(
        [sys.executable, "-S", *words],
        cwd=directory,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(directory),
            "PYTHONPATH": f"{ROOT}{os.pathsep}{packages}",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("missing", REQUIRED, ids=lambda one: one.package)
def test_a_command_says_which_package_is_missing_what_needs_it_and_what_to_run(
    tmp_path: Path, missing: Dependency
) -> None:
    words = ("train", "fp8_recipe=mxfp8", "training.steps=1", "device=emulated", "run_dir=run")
    done = without({missing.module}, tmp_path, "-m", "nemo_fp8_recipes", *words)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("nemo-fp8: This environment lacks")
    assert f"{missing.package}, which {missing.purpose}" in line
    assert line.endswith(f"{sys.executable} -m pip install '{missing.requirement}'")
    assert not (tmp_path / "run").exists()


def test_all_that_is_missing_is_said_at_once_and_help_needs_nothing(tmp_path: Path) -> None:
    names = {one.module for one in REQUIRED}
    (tmp_path / "one").mkdir()
    done = without(names, tmp_path / "one", "-m", "nemo_fp8_recipes", "doctor")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert all(f"'{one.requirement}'" in line for one in REQUIRED)
    (tmp_path / "two").mkdir()
    assert without(names, tmp_path / "two", "-m", "nemo_fp8_recipes", "--help").returncode == 0


SCRIPT = """
import nemo_fp8_recipes as fp8
from nemo_fp8_recipes.errors import Fp8Error
try:
    {code}
except Fp8Error as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("missing", "code"),
    [
        ("hydra", "fp8.start(fp8.load('mxfp8'))"),
        ("google_crc32c", "fp8.start(fp8.load('mxfp8'), device='emulated')"),
        ("google_crc32c", "import torch; fp8.telemetry.attach(torch.nn.Linear(1, 1), directory='run')"),
        ("pyarrow", "import torch; fp8.telemetry.attach(torch.nn.Linear(1, 1), directory='run')"),
    ],
)
def test_a_script_gets_the_same_sentence(tmp_path: Path, missing: str, code: str) -> None:
    done = without({missing}, tmp_path, "-c", SCRIPT.format(code=code))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("This environment lacks")
    assert missing.replace("_", "-") in done.stdout
