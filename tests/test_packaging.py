"""The wheel carries what it needs and touches none of the user's own builds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What an NGC container could hold: local builds whose versions no index knows.
FOREIGN_BUILDS = {
    "torch": "2.9.0a0+50eac811a6.nv25.09",
    "megatron-core": "0.15.0rc7",
    "transformer-engine": "2.7.0+fedd9dd",
    "transformer-engine-torch": "2.7.0+fedd9dd",
    "nvidia-modelopt": "0.35.0",
}


def _clean_environment(**extra: str) -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "PYTHON"))} | extra


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            directory,
            ROOT,
        ],
        check=True,
        env=_clean_environment(),
    )
    (built,) = directory.glob("*.whl")
    return built


def test_the_wheel_holds_the_configuration_groups(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for yaml in (ROOT / "conf").rglob("*.yaml"):
        assert f"nemo_fp8_recipes/conf/{yaml.relative_to(ROOT / 'conf').as_posix()}" in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]


def test_an_installed_wheel_composes_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            "--target",
            site,
            wheel,
        ],
        check=True,
        env=_clean_environment(),
    )
    script = (
        "import nemo_fp8_recipes, sys; from nemo_fp8_recipes.cli import main; "
        "print(nemo_fp8_recipes.__file__, file=sys.stderr); "
        "sys.exit(main(['show', 'fp8_recipe=blockwise', '--json']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=_clean_environment(PYTHONPATH=str(site)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert str(site) in done.stderr
    assert json.loads(done.stdout)["recipe"]["name"] == "blockwise"


def test_pip_changes_none_of_the_users_builds(wheel: Path, tmp_path: Path) -> None:
    """pip resolves our wheel beside foreign builds of the peers; with no index, any change would fail."""
    foreign = tmp_path / "foreign"
    for name, version in FOREIGN_BUILDS.items():
        info = foreign / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "RECORD").write_text("")
        (info / "INSTALLER").write_text("conda\n")
    report = tmp_path / "report.json"
    plan = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--no-index",
        "--quiet",
        "--report",
        str(report),
    ]
    done = subprocess.run(
        [*plan, "--upgrade", str(wheel)],
        env=_clean_environment(PYTHONPATH=str(foreign)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    planned = {item["metadata"]["name"].lower() for item in json.loads(report.read_text())["install"]}
    assert planned <= {"nemo-fp8-recipes"}


def test_the_peers_are_not_requirements_of_the_package(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    required = [
        line.split(":", 1)[1].strip().lower()
        for line in archive.read(metadata).decode().splitlines()
        if line.startswith("Requires-Dist:") and "extra ==" not in line
    ]
    assert required, "the wheel declares its light dependencies"
    for peer in ("torch", "megatron", "transformer", "nemo", "nvidia"):
        assert not [requirement for requirement in required if requirement.startswith(peer)]
