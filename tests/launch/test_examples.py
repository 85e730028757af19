"""The examples for SLURM compose, and what they submit is bash."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.conftest import clean_environment

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "slurm"


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.sh")), ids=lambda path: path.name)
def test_an_example_makes_a_batch_script(example: Path, tmp_path: Path) -> None:
    (tmp_path / "pretrain.py").write_text("")
    tool = tmp_path / "bin" / "nemo-fp8"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\nexec {sys.executable} -m nemo_fp8_recipes "$@"\n')
    tool.chmod(0o755)
    environment = {**clean_environment(), "PATH": f"{tool.parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", example, "--dry-run"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    if "submitit" in example.name:  # which writes the script itself
        assert "timeout_min: 120" in done.stdout
        assert done.stdout.count("\nfp8_recipe=") == 3
        return
    assert done.stdout.startswith("#!/bin/bash\n#SBATCH")
    parsed = subprocess.run(["bash", "-n"], input=done.stdout, capture_output=True, text=True)
    assert parsed.returncode == 0, parsed.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "pretrain.py"]


def test_the_readme_names_every_example() -> None:
    readme = (EXAMPLES / "README.md").read_text()
    assert all(f"({path.name})" in readme for path in EXAMPLES.glob("*.sh"))
