"""The wheel carries what it needs and touches none of the user's own builds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
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
    # A namespace package, which other plugins share: an __init__.py of ours would hide theirs.
    assert "hydra_plugins/nemo_fp8_recipes_searchpath/__init__.py" in names
    assert "hydra_plugins/__init__.py" not in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that the wheel is installed into."""
    site = tmp_path_factory.mktemp("site")
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
    return site


def test_an_installed_wheel_composes_without_the_checkout(site: Path, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("installed_as", ["wheel", "editable", "checkout"])
def test_a_hydra_app_of_someone_else_has_our_groups(site: Path, tmp_path: Path, installed_as: str) -> None:
    """The example application, away from the checkout, finds `fp8_recipe` however the package got there."""
    app = tmp_path / "app"
    shutil.copytree(ROOT / "examples" / "hydra_app", app)
    dependencies = sysconfig.get_path("purelib")
    # -S leaves out the .pth file that makes the test environment's own editable install visible.
    interpreter, path = {
        "wheel": ([sys.executable, "-S"], f"{site}{os.pathsep}{dependencies}"),
        "editable": ([sys.executable], ""),
        "checkout": ([sys.executable, "-S"], f"{ROOT}{os.pathsep}{dependencies}"),
    }[installed_as]

    def compose(*overrides: str, config: str = "config") -> str:
        done = subprocess.run(
            [*interpreter, str(app / "train.py"), "--config-name", config, "--cfg", "job", *overrides],
            cwd=tmp_path,
            env=_clean_environment(**({"PYTHONPATH": path} if path else {})),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    # `- optional fp8_recipe: null` in the defaults list: the choice is given without a plus.
    chosen = compose("fp8_recipe=mxfp8", "fp8_recipe.fp8_format=hybrid", "width=512")
    assert "name: mxfp8" in chosen
    assert "fp8_format: hybrid" in chosen
    assert "width: 512" in chosen
    assert "fp8_recipe" not in compose()
    if installed_as == "wheel":
        # A defaults list that does not know the group, a preset, and a choice of the application's own.
        (app / "conf" / "bare.yaml").write_text("lr: 0.1\n")
        assert "preset: nemotron_h" in compose("+fp8_recipe=nemotron_h", config="bare")
        (app / "conf" / "fp8_recipe").mkdir()
        (app / "conf" / "fp8_recipe" / "mxfp8.yaml").write_text("name: mine\n")
        assert "name: mine" in compose("fp8_recipe=mxfp8")


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
