"""`python -m nemo_fp8_recipes.emulation`: running programs that know nothing of this package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.processes import environment

PROGRAM = """\
import sys
import neighbour
import torch
import transformer_engine.pytorch as te

print("arguments", sys.argv[1:], __name__, neighbour.VALUE)
print("device", torch.cuda.get_device_name(), te.Linear(16, 16)(torch.ones(8, 16).cuda()).shape[0])
sys.exit(7)
"""


def start(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nemo_fp8_recipes.emulation", *arguments],
        env=environment(),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def program(directory: Path) -> Path:
    directory.mkdir()
    (directory / "neighbour.py").write_text("VALUE = 'found'\n")
    path = directory / "program.py"
    path.write_text(PROGRAM)
    return path


def test_a_script_gets_its_arguments_its_directory_and_its_exit_status(tmp_path: Path) -> None:
    path = program(tmp_path / "project")
    done = start("--device", "b200", str(path), "--device", "mine", "--steps=3", cwd=tmp_path)
    assert done.returncode == 7, done.stderr
    assert "arguments ['--device', 'mine', '--steps=3'] __main__ found" in done.stdout
    assert "device NVIDIA B200 (emulated) 8" in done.stdout
    assert "[emulated b200]" in done.stderr


def test_a_module_is_found_in_the_current_directory(tmp_path: Path) -> None:
    program(tmp_path / "project")
    done = start("-m", "program", "one", cwd=tmp_path / "project")
    assert done.returncode == 7, done.stderr
    assert "arguments ['one'] __main__ found" in done.stdout
    assert "H100" in done.stdout


def test_folders_named_like_optional_packages_beside_the_script_change_nothing(tmp_path: Path) -> None:
    """A folder without an __init__ can be imported, too, but is not the package of that name."""
    path = program(tmp_path / "project")
    for name in ("onnx", "onnxscript"):
        (path.parent / name).mkdir()
        (path.parent / name / "notes.py").write_text("TEXT = 'own'\n")
    done = start(str(path), cwd=tmp_path)
    assert done.returncode == 7, done.stderr


def test_bad_input_is_one_line_and_a_status(tmp_path: Path) -> None:
    for arguments, message in (
        (("--device", "b20", "program.py"), "There is no GPU called 'b20'"),
        (("missing.py",), "There is no script 'missing.py'"),
        (("-m", "no_such_module"), "There is no module 'no_such_module'"),
    ):
        (tmp_path / "program.py").write_text("")
        done = start(*arguments, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
