"""`nemo-fp8 report`: what it says about a run, and one clear error for what is not one."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from nemo_fp8_recipes import cli
from nemo_fp8_recipes.errors import ReportError
from nemo_fp8_recipes.report import text
from nemo_fp8_recipes.report.effect import effects
from nemo_fp8_recipes.telemetry import store
from nemo_fp8_recipes.telemetry.series import Series, StepValues
from nemo_fp8_recipes.telemetry.store import StoreWriter
from nemo_fp8_recipes.training.run_directory import RunDirectory
from tests.injection.examples import gpt_manifest
from tests.report.runs import make


def shown(path: Path, *, width: int = 120, all_layers: bool = False) -> str:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    console = Console(width=width, record=True, highlight=False, file=terminal)
    text.render(path, console, all_layers=all_layers)
    return console.export_text()


def test_header_and_loss(tmp_path: Path) -> None:
    output = shown(make(tmp_path / "run"))
    assert "finished, 2 min 11 s" in output
    assert "emulated h100" in output
    assert "Loss 5.0000 → 3.1000 (step 1 → 20)" in output


def _runs(path: Path) -> RunDirectory:
    """Make the run look as while it trains, until what is returned is closed."""
    record = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**record, "status": "running", "ended": None}))
    return RunDirectory.reopen(path)


def test_a_run_that_was_killed_does_not_run(tmp_path: Path) -> None:
    """`run.json` still says running; the lock that its process held is gone with it."""
    make(tmp_path, telemetry=False)
    run = _runs(tmp_path)
    assert "status  running, " in shown(tmp_path)
    assert "so far" in shown(tmp_path)
    assert "No amax or scale has been written yet." in shown(tmp_path)
    run.close()
    output = shown(tmp_path)
    assert "status  interrupted: its process is gone without a word" in output
    assert "so far" not in output
    assert "The run wrote no amax or scale" in output


def test_effect_says_what_happened_to_each_tensor(tmp_path: Path) -> None:
    make(tmp_path)
    by_name = {(e.module[-16:], e.tensor): e for e in effects(store.read(tmp_path))}
    effect = by_name["0.mlp.linear_fc1", "input"]
    assert (effect.recipe, effect.format, effect.steps) == ("delayed", "e4m3", (1, 10, 20))
    assert effect.amax == (2.0, 4.0, 16.0)
    assert effect.growth == 8.0
    assert effect.scale == (1.0, 56.0)
    # 16 x 56 = 896 is twice what E4M3 holds, 4 x 224 = 896 as well; the first cast had room.
    assert effect.headroom == pytest.approx(-1.0)
    assert effect.saturated == 2
    assert effect.window == (0.0, 16.0)
    gradient = by_name["0.mlp.linear_fc1", "grad_output"]
    assert gradient.headroom == pytest.approx(math.log2(57344 / (1e-5 * 2e9)), rel=1e-5)
    assert gradient.saturated == 0


def test_json_has_the_newest_entries_of_a_long_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_fp8_recipes.report import document as json_document

    make(tmp_path)
    whole = json_document.document(tmp_path)["tensors"][0]
    assert (len(whole["window"]), whole["window_length"]) == (2, 2)
    monkeypatch.setattr(json_document, "_WINDOW", 1)
    cut = json_document.document(tmp_path)["tensors"][0]
    assert (cut["window"], cut["window_length"]) == ([whole["window"][-1]], 2)


def test_the_table_has_a_row_for_every_tensor_of_every_layer(tmp_path: Path) -> None:
    output = shown(make(tmp_path))
    assert "Effect of delayed (3 logged steps, 1 → 20)" in output
    assert output.count("grad_output") == 2
    assert "2 → 16" in output
    assert "-1.0" in output
    assert "2 tensors saturated in some logged step" in output
    assert "2 tensors grew by x8 or more" in output


def test_block_scaling_shows_bounds_and_the_range_of_the_blocks(tmp_path: Path) -> None:
    output = shown(make(tmp_path, recipe="mxfp8"))
    assert "≤2 → 16" in output
    assert "2^5" in output
    assert "Headroom" not in output


def logged(run_dir: Path, *steps: dict[tuple[str, str, str], float]) -> None:
    """Steps 1, 2, … of one operand: (stat, recipe, format) -> value."""
    StoreWriter(run_dir, {}).write(
        [
            StepValues(
                step,
                tuple(Series("fc1", "input", stat, recipe, fmt) for stat, recipe, fmt in values),
                np.float32(list(values.values())),
                {},
            )
            for step, values in enumerate(steps, start=1)
        ]
    )


def test_bounds_are_not_mixed_with_the_amax_of_steps_that_read_the_tensors(tmp_path: Path) -> None:
    exact, bound = ("amax", "mxfp8", "e4m3"), ("amax_bound", "mxfp8", "e4m3")
    logged(tmp_path, {exact: 1.0, bound: 1.75}, {bound: 1.75}, {exact: 1.0, bound: 1.75})
    (effect,) = effects(store.read(tmp_path))
    assert effect.bound
    assert effect.amax == (1.75, 1.75, 1.75)


def test_where_every_step_reads_the_tensors_the_amax_is_no_bound(tmp_path: Path) -> None:
    exact, bound = ("amax", "mxfp8", "e4m3"), ("amax_bound", "mxfp8", "e4m3")
    logged(tmp_path, {exact: 1.0, bound: 1.75}, {exact: 1.5, bound: 1.75})
    (effect,) = effects(store.read(tmp_path))
    assert not effect.bound
    assert effect.amax == (1.0, 1.5)


def test_after_a_change_of_the_recipe_the_effect_is_that_of_the_last_one(tmp_path: Path) -> None:
    delayed = {("amax", "delayed", "e4m3"): 8.0, ("scale", "delayed", "e4m3"): 56.0}
    mxfp8 = {("amax_bound", "mxfp8", "e4m3"): 2.0}
    logged(tmp_path, delayed, mxfp8, mxfp8)
    (effect,) = effects(store.read(tmp_path))
    assert (effect.recipe, effect.steps, effect.amax) == ("mxfp8", (2, 3), (2.0, 2.0))
    assert effect.scale is None


def test_what_another_recipe_would_do_is_no_effect(tmp_path: Path) -> None:
    logged(tmp_path, {("amax", "mxfp8", "e4m3"): 2.0, ("whatif/nvfp4/sqnr", "nvfp4", "e2m1"): 20.0})
    (effect,) = effects(store.read(tmp_path))
    assert (effect.recipe, effect.format, effect.amax) == ("mxfp8", "e4m3", (2.0,))


def test_a_large_model_is_shown_in_one_row_a_kind(tmp_path: Path) -> None:
    make(tmp_path, layers=40)
    output = shown(tmp_path)
    assert output.count("grad_output") == 1
    assert "of 40" in output
    assert shown(tmp_path, all_layers=True).count("grad_output") == 40


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_report_fits_the_terminal(tmp_path: Path, width: int) -> None:
    output = shown(make(tmp_path), width=width)
    assert max(map(len, output.splitlines())) <= width
    assert "…" not in output


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    make(tmp_path, telemetry=False)
    (tmp_path / "metrics.jsonl").unlink()
    run = _runs(tmp_path)
    output = shown(tmp_path)
    run.close()
    assert "No step has been logged yet." in output
    assert "No amax or scale has been written yet." in output


def test_bf16_has_nothing_to_show(tmp_path: Path) -> None:
    assert "no tensor is quantised" in shown(make(tmp_path, recipe="bf16", telemetry=False))


def test_a_loss_that_is_not_finite_is_counted(tmp_path: Path) -> None:
    make(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "loss": null}\n{"step": 22, "lo')
    assert "1 steps had a loss that is not finite" in shown(tmp_path)


def test_json_has_the_same_and_is_strict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "--json", str(make(tmp_path))]) == 0
    document = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert document["loss"] == {"first_step": 1, "first": 5.0, "last_step": 20, "last": 3.1}
    assert len(document["tensors"]) == 6
    assert document["tensors"][0]["amax"] == [2.0, 4.0, 16.0]


def _no_directory(path: Path) -> str:
    return str(path / "missing")


def _a_file(path: Path) -> str:
    (path / "file").write_text("")
    return str(path / "file")


def _not_a_run(path: Path) -> str:
    return str(path)


def _damaged_record(path: Path) -> str:
    (make(path) / "run.json").write_text("{")
    return str(path)


def _damaged_metrics(path: Path) -> str:
    (make(path) / "metrics.jsonl").write_text("{]\n")
    return str(path)


def _metrics_of_bytes(path: Path) -> str:
    """What is said must not be the file itself, however large."""
    (make(path) / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 2.0}\n' + b"\xb5\x00" * 100_000 + b"\n")
    return str(path)


def _metrics_without_a_step(path: Path) -> str:
    (make(path) / "metrics.jsonl").write_text('[1, 2]\n{"loss": 2.0}\n')
    return str(path)


def _damaged_manifest(path: Path) -> str:
    (make(path) / "manifest.json").write_text("[]")
    return str(path)


def _damaged_telemetry(path: Path) -> str:
    part = store.parts(make(path))[0].path
    part.write_bytes(part.read_bytes()[:50])
    return str(path)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_no_directory, "There is no directory"),
        (_a_file, "is not a directory"),
        (_not_a_run, "is not a run directory"),
        (_damaged_record, "run.json"),
        (_damaged_metrics, "metrics.jsonl"),
        (_metrics_of_bytes, "metrics.jsonl is damaged: line 2 is no JSON object"),
        (_metrics_without_a_step, "metrics.jsonl is damaged: line 1 is no JSON object"),
        (_damaged_manifest, "manifest.json"),
        (_damaged_telemetry, "steps-0000000001-0000000020.parquet"),
    ],
)
def test_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], str], said: str
) -> None:
    path = spoil(tmp_path)
    with pytest.raises(ReportError):
        text.render(path, Console(quiet=True))
    assert cli.main(["report", path]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert "Traceback" not in captured.err
    assert len(captured.err) < 500
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [([], "0 were given"), (["a", "b"], "2 were given"), (["--txt", "a"], "Did you mean --text?")],
)
def test_wrong_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert cli.main(["report", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "--help"]) == 0
    assert "nemo-fp8 report runs/" in capsys.readouterr().out


def test_the_report_needs_no_torch(tmp_path: Path) -> None:
    make(tmp_path)
    program = (
        "import sys; from nemo_fp8_recipes import cli; cli.main(['report', sys.argv[1]]); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"


def test_rows_of_an_earlier_recipe_are_mentioned(tmp_path: Path) -> None:
    """A run whose recipe changed: the table is of the last one, and says what else the store holds."""
    path = make(tmp_path / "run")
    assert "Not shown" not in shown(path)
    names = tuple(
        Series("decoder.layers.1.mlp.linear_fc1", tensor, "amax_bound", "mxfp8", "e4m3")
        for tensor in ("input", "weight")
    )
    StoreWriter(path, {}).write([StepValues(30, names, np.float32([3.0, 4.0]))])
    (path / "manifests").mkdir()
    for step, manifest in ((1, gpt_manifest(1)), (15, gpt_manifest(1)), (30, gpt_manifest(2))):
        (path / "manifests" / f"step_{step:08d}.json").write_text(manifest.to_json())
    output = " ".join(shown(path).split())
    assert "Effect of delayed, mxfp8" in output
    assert "Not shown: delayed quantised 2 of these tensors before, in steps 1 to 20." in output
    # The manifest that a resumed run wrote again says nothing new.
    assert "recipes mxfp8 from step 1, mxfp8 from step 30" in output
