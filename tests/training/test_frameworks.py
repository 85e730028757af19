"""`framework=`: what is absent is said with what to install, before anything else happens."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from nemo_fp8_recipes.commands import train
from nemo_fp8_recipes.config import compose
from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.training import frameworks
from nemo_fp8_recipes.training.frameworks import FRAMEWORKS, find
from nemo_fp8_recipes.training.settings import read_settings


def package(directory: Path, dotted: str) -> None:
    """An importable package of that path, and nothing in it."""
    for part in dotted.split("."):
        directory = directory / part
        directory.mkdir(exist_ok=True)
        (directory / "__init__.py").touch()


def distribution(directory: Path, name: str, version: str) -> None:
    info = directory / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory at the front of the import path, where no framework but ours is found elsewhere."""
    for name in [name for name in sys.modules if name.split(".")[0] == "nemo"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


def test_the_default_is_the_reference_loop() -> None:
    assert read_settings(compose()).framework == "megatron_core"
    assert {"megatron_core", "nemo", "bridge"} == set(FRAMEWORKS)


@pytest.mark.parametrize(("typed", "close"), [("nemo2", "nemo"), ("megatron-core", "megatron_core")])
def test_a_framework_that_does_not_exist_is_named_with_the_nearest(typed: str, close: str) -> None:
    with pytest.raises(ConfigError, match=f"framework={typed} is not available.*'{close}'"):
        compose([f"framework={typed}"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nemo", ["NeMo 2", "nemo_toolkit[lightning]==2.7.3", "megatron-core==0.15.3"]),
        ("bridge", ["Megatron-Bridge", "0.6.2", "0.19.2"]),
    ],
)
def test_what_is_absent_is_said_with_what_to_install(installed: Path, name: str, words: list[str]) -> None:
    with pytest.raises(ConfigError, match="is not installed here") as error:
        find(name)
    for word in words:
        assert word in str(error.value)
    assert error.value.key == "framework"


def test_nemo_3_is_told_apart_and_points_to_bridge(installed: Path) -> None:
    package(installed, "nemo.collections.asr")
    distribution(installed, "nemo_toolkit", "3.0.0")
    with pytest.raises(ConfigError, match=r"nemo_toolkit 3\.0\.0 does not have.*framework=bridge"):
        find("nemo")


def test_nemo_2_is_found_without_importing_it(installed: Path) -> None:
    package(installed, "nemo.collections.llm")
    (installed / "nemo" / "__init__.py").write_text("raise RuntimeError('imported')")
    distribution(installed, "nemo_toolkit", "2.7.3")
    assert find("nemo").name == "nemo"


def test_the_command_stops_before_a_run_directory_exists(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="framework=nemo needs NeMo 2"):
        train.run(["framework=nemo"])
    assert not (tmp_path / "runs").exists()


def test_a_framework_without_its_module_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = frameworks.Framework(
        name="other",
        title="Other",
        session="nemo_fp8_recipes.training.frameworks.other",
        package="hydra",
        distribution="hydra-core",
        install="",
    )
    with pytest.raises(ConfigError, match=r"no nemo_fp8_recipes\.training\.frameworks\.other"):
        absent.load()


@pytest.mark.parametrize(
    ("key", "entry"),
    [
        ("recipe_schedule", "{recipe: bf16, to_step: 2}"),
        ("recipe_modules", "{modules: '*fc2', recipe: bf16}"),
    ],
)
def test_recipes_that_change_are_refused_where_the_trainer_cannot_follow(key: str, entry: str) -> None:
    settings = read_settings(compose([f"{key}=[{entry}]"]))
    FRAMEWORKS["megatron_core"].require_one_recipe(settings)
    FRAMEWORKS["bridge"].require_one_recipe(read_settings(compose()))
    with pytest.raises(ConfigError, match=f"framework=bridge trains everything .* and {key} names others"):
        FRAMEWORKS["bridge"].require_one_recipe(settings)
