"""`nemo-fp8 manifest`: one run, two runs, and what is no manifest."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_fp8_recipes import cli
from nemo_fp8_recipes.injection.rows import Manifest
from tests.injection.examples import gpt_manifest
from tests.support.processes import run_python


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def save(path: Path, manifest: Manifest) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(manifest.to_json())
    return str(path.parent)


def hybrid(manifest: Manifest, *modules: str) -> Manifest:
    """With gradients in E5M2 in the modules of these names."""
    rows = [
        dataclasses.replace(row, grad_output=dataclasses.replace(row.grad_output, format="e5m2"))
        if row.grad_output is not None and row.module.endswith(modules)
        else row
        for row in manifest.rows
    ]
    return dataclasses.replace(manifest, rows=tuple(rows))


def test_one_run_is_shown_as_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["manifest", save(tmp_path / "manifest.json", gpt_manifest(8))]) == 0
    output = capsys.readouterr().out
    assert "modules quantised by mxfp8" in output
    assert "0-7" in output
    assert "Changed in step" not in output


def test_json_is_the_manifest_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = gpt_manifest(2)
    assert cli.main(["manifest", "--json", save(tmp_path / "manifest.json", manifest)]) == 0
    assert Manifest.from_json(capsys.readouterr().out) == manifest


def test_two_runs_that_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = save(tmp_path / "a" / "manifest.json", gpt_manifest(8))
    after = save(tmp_path / "b" / "manifest.json", hybrid(gpt_manifest(8), "linear_fc1", "linear_qkv"))
    assert cli.main(["manifest", before, after]) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    # Eight layers that differ alike are one line, and of an operand only what differs is shown.
    assert ["0-7", "self_attention.linear_qkv", "grad_output.format", "e4m3", "e5m2"] in lines
    assert ["0-7", "mlp.linear_fc1", "grad_output.format", "e4m3", "e5m2"] in lines
    assert len([line for line in lines if "e5m2" in line]) == 2


def test_two_runs_that_are_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = save(tmp_path / "a" / "manifest.json", gpt_manifest(2))
    after = save(tmp_path / "b" / "manifest.json", gpt_manifest(2))
    assert cli.main(["manifest", before, after]) == 0
    assert "No module differs." in capsys.readouterr().out


def test_a_module_that_one_run_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = save(tmp_path / "a" / "manifest.json", gpt_manifest(2))
    after = save(tmp_path / "b" / "manifest.json", gpt_manifest(3))
    assert cli.main(["manifest", before, after]) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["2", "mlp.linear_fc1", "module", "-", "present"] in lines


def test_differences_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = save(tmp_path / "a" / "manifest.json", gpt_manifest(1))
    after = save(tmp_path / "b" / "manifest.json", hybrid(gpt_manifest(1), "linear_fc1"))
    assert cli.main(["manifest", "--json", before, after]) == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["before"], document["after"]) == (before, after)
    (difference,) = document["differences"]
    assert difference["module"] == "decoder.layers.0.mlp.linear_fc1"
    assert difference["field"] == "grad_output"
    assert (difference["before"]["format"], difference["after"]["format"]) == ("e4m3", "e5m2")


def test_a_run_whose_recipe_changed_shows_what_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = gpt_manifest(4), hybrid(gpt_manifest(4), "linear_fc2")
    save(tmp_path / "manifest.json", second)
    save(tmp_path / "manifests" / "step_00000001.json", first)
    save(tmp_path / "manifests" / "step_00000101.json", second)
    assert cli.main(["manifest", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "Changed in step 101" in output
    assert "grad_output.format" in output.split("Changed in step 101")[1]
    # A file of one step can be compared as well as a run.
    assert cli.main(["manifest", str(tmp_path / "manifests" / "step_00000001.json"), str(tmp_path)]) == 1


def _nothing(path: Path) -> str:
    return str(path)


def _absent(path: Path) -> str:
    return str(path / "missing")


def _damaged(path: Path) -> str:
    (path / "manifest.json").write_text("{")
    return str(path)


def _newer(path: Path) -> str:
    document = {**gpt_manifest(1).to_dict(), "schema_version": 99}
    (path / "manifest.json").write_text(json.dumps(document))
    return str(path)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_nothing, "has no manifest.json. A run writes it after its first step"),
        (_absent, "There is no "),
        (_damaged, "manifest.json: The manifest is not JSON"),
        (_newer, "manifest.json: The manifest has schema version 99"),
    ],
)
def test_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], str], said: str
) -> None:
    assert cli.main(["manifest", spoil(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [([], "0 were given"), (["a", "b", "c"], "3 were given"), (["--jsn", "a"], "Did you mean '--json'?")],
)
def test_wrong_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert cli.main(["manifest", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_it_needs_no_torch(tmp_path: Path) -> None:
    path = save(tmp_path / "manifest.json", gpt_manifest(1))
    done = run_python(
        f"from nemo_fp8_recipes import cli; cli.main(['manifest', {path!r}]); print('torch' in _sys.modules)"
    )
    assert done.stdout.splitlines()[-1] == "False"
