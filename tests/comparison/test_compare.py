"""`nemo-fp8 compare`: what is run, what is kept, and the numbers of the table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nemo_fp8_recipes.cli import main
from nemo_fp8_recipes.comparison import make_plan
from nemo_fp8_recipes.errors import ConfigError, Fp8Error, PreflightError, RecipeError, RunDirectoryError
from nemo_fp8_recipes.injection import Manifest
from tests.comparison import fake_train
from tests.injection.examples import high_precision_row, mxfp8_row
from tests.training.command import SMALL, SMALL_DATA, environment

RUNNER = sys.modules["nemo_fp8_recipes.comparison.execute"]

FAKE = str(Path(fake_train.__file__))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch):
    """Runs that only write what `nemo-fp8 train` would have left; options per recipe."""
    options: dict[str, tuple[float, float, int]] = {}
    real = RUNNER.command

    def command(variant: Any) -> list[str]:
        words = real(variant)[3:]
        return [sys.executable, FAKE, *map(str, options.get(variant.recipe, (0.25, 0.0, 0))), *words]

    monkeypatch.setattr(RUNNER, "command", command)
    return options


def compare_json(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> dict[str, Any]:
    assert main(["compare", *arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out)


class TestPlan:
    def test_the_baseline_comes_first_and_each_run_has_its_own_directory(self, tmp_path: Path) -> None:
        made = make_plan(["fp8_recipe=mxfp8,fp8_cs", "training.steps=7", f"run_dir={tmp_path / 'c'}"])
        assert [(v.label, v.recipe) for v in made.variants] == [
            ("bf16", "bf16"),
            ("mxfp8", "mxfp8"),
            ("tensorwise", "tensorwise"),
        ]
        assert made.baseline == "bf16"
        assert len({v.path for v in made.variants}) == 3
        for variant in made.variants:
            assert variant.steps == 7
            assert variant.path.parent == tmp_path / "c"
            assert variant.config.run_dir == str(variant.path)
        assert not (tmp_path / "c").exists()

    def test_a_baseline_of_ones_own_and_none(self, tmp_path: Path) -> None:
        where = f"run_dir={tmp_path / 'c'}"
        made = make_plan(["fp8_recipe=mxfp8,delayed", where], baseline="delayed")
        assert [v.label for v in made.variants] == ["delayed", "mxfp8"]
        assert [v.label for v in make_plan(["fp8_recipe=mxfp8", where], baseline=None).variants] == ["mxfp8"]

    def test_runs_of_one_recipe_with_other_options(self, tmp_path: Path) -> None:
        made = make_plan(
            [f"run_dir={tmp_path / 'c'}"],
            more=["delayed", "delayed fp8_recipe.amax_history_len=4"],
        )
        assert [v.label for v in made.variants] == ["bf16", "delayed", "delayed_amax_history_len=4"]
        assert made.variants[2].config.fp8_recipe.amax_history_len == 4

    @pytest.mark.parametrize(
        ("overrides", "more", "error", "words"),
        [
            ([], [], ConfigError, "No recipe to compare"),
            (["fp8_recipe=mxfp8,mxfp8"], [], ConfigError, "mxfp8 is asked for twice"),
            (["fp8_recipe=mxfp9"], [], RecipeError, "Did you mean 'mxfp8'"),
            (["fp8_recipe=mxfp8", "model.layers=2"], [], ConfigError, "num_layers"),
            # The last one fails, so none is started.
            (["fp8_recipe=delayed,mxfp8", "hardware=h100"], [], PreflightError, "mxfp8 needs a GPU"),
            (["fp8_recipe=mxfp8", "launcher=slurm"], [], ConfigError, "launcher"),
            (["fp8_recipe=mxfp8", "training.resume=auto"], [], ConfigError, "--resume"),
            ([], ["delayed 'x"], ConfigError, "cannot be read"),
        ],
    )
    def test_what_cannot_run_is_refused_before_anything_starts(
        self, overrides: list[str], more: list[str], error: type[Fp8Error], words: str, tmp_path: Path
    ) -> None:
        with pytest.raises(error, match=words):
            make_plan([*overrides, f"run_dir={tmp_path / 'c'}"], more=more)
        assert not (tmp_path / "c").exists()

    def test_nothing_is_overwritten(self, tmp_path: Path) -> None:
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "notes.txt").write_text("mine")
        with pytest.raises(RunDirectoryError, match="not empty"):
            make_plan(["fp8_recipe=mxfp8", f"run_dir={tmp_path / 'c'}"])
        (tmp_path / "c" / "run.json").write_text("{}")
        with pytest.raises(RunDirectoryError, match="is a run directory"):
            make_plan(["fp8_recipe=mxfp8", f"run_dir={tmp_path / 'c'}"], resume=True)
        with pytest.raises(ConfigError, match="--resume needs the directory"):
            make_plan(["fp8_recipe=mxfp8"], resume=True)


class TestRunning:
    def test_the_numbers_of_the_table(self, tmp_path: Path, fake, capsys: pytest.CaptureFixture[str]) -> None:
        where = tmp_path / "it's here"
        told = compare_json(capsys, "fp8_recipe=mxfp8", f'run_dir="{where}"')
        assert told == json.loads((where / "comparison.json").read_text())
        base, mxfp8 = told["runs"]
        assert (base["label"], mxfp8["label"], told["baseline"]) == ("bf16", "mxfp8", "bf16")
        # Losses 5 - step/10: the mean of the last two of 20 steps.
        assert base["loss"] == pytest.approx(3.05)
        assert base["loss_difference"] is None
        assert mxfp8["loss"] == pytest.approx(3.3)
        assert mxfp8["loss_difference"] == pytest.approx(0.25)
        assert mxfp8["held_out_difference"] == pytest.approx(0.25)
        # The two slow first steps are not a step's time.
        assert (base["step_time_ms"], mxfp8["step_time_ms"], mxfp8["step_time_ratio"]) == (20.0, 30.0, 1.5)
        assert told["emulated"] is True
        assert (where / "mxfp8.log").read_text() == "fake run of mxfp8\n"

    def test_a_run_that_fails_does_not_stop_the_others_and_resume_keeps_what_finished(
        self, tmp_path: Path, fake, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = ["compare", "fp8_recipe=mxfp8,delayed", f"run_dir={tmp_path / 'c'}"]
        fake["mxfp8"] = (1.0, 0.0, 2)
        assert main(command) == 1
        shown = capsys.readouterr().out
        assert "the loss is nan" in shown
        assert str(tmp_path / "c" / "mxfp8.log") in shown
        told = json.loads((tmp_path / "c" / "comparison.json").read_text())
        assert [run["status"] for run in told["runs"]] == ["finished", "failed", "finished"]

        kept = (tmp_path / "c" / "bf16" / "run.json").stat().st_mtime_ns
        fake["mxfp8"] = (0.25, 0.0, 0)
        assert main(command) == 2  # without --resume: not empty
        assert main([*command, "--resume", "training.seed=7"]) == 2  # another configuration
        assert "training.seed=1234" in capsys.readouterr().err
        told = compare_json(capsys, *command[1:], "--resume")
        assert [run["status"] for run in told["runs"]] == ["finished"] * 3
        assert (tmp_path / "c" / "bf16" / "run.json").stat().st_mtime_ns == kept
        words = json.loads((tmp_path / "c" / "mxfp8" / "run.json").read_text())["overrides"]
        assert "training.resume=auto" in words

    def test_a_run_that_was_killed_while_it_began_is_run_again(
        self, tmp_path: Path, fake, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Its record is there, its configuration is not: nothing was trained yet."""
        command = ["compare", "fp8_recipe=mxfp8", f"run_dir={tmp_path / 'c'}"]
        assert main(command) == 0
        run = tmp_path / "c" / "mxfp8"
        (run / "config.yaml").unlink()
        assert main([*command, "--resume"]) == 2
        assert f"{run / 'config.yaml'} cannot be read" in capsys.readouterr().err
        (run / "metrics.jsonl").unlink()
        (run / "run.json").write_text((run / "run.json").read_text().replace('"finished"', '"running"'))
        told = compare_json(capsys, *command[1:], "--resume")
        assert [one["status"] for one in told["runs"]] == ["finished"] * 2

    def test_a_signal_ends_the_run_and_the_comparison(self, tmp_path: Path) -> None:
        """The command itself in a process of its own, stopped as Ctrl-C does."""
        code = (
            "import sys; from nemo_fp8_recipes.cli import main\n"
            "import nemo_fp8_recipes.commands.compare\n"
            "runner = sys.modules['nemo_fp8_recipes.comparison.execute']; real = runner.command\n"
            f"fake = [sys.executable, {FAKE!r}, '0.1', '5', '0']\n"
            "runner.command = lambda variant: fake + real(variant)[3:]\n"
            f"sys.exit(main(['compare', 'fp8_recipe=mxfp8', 'run_dir={tmp_path / 'c'}']))"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        deadline = time.monotonic() + 60
        while not (tmp_path / "c" / "bf16" / "metrics.jsonl").exists():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "--resume" in output
        told = json.loads((tmp_path / "c" / "comparison.json").read_text())
        assert [run["status"] for run in told["runs"]] == ["interrupted", "not started"]


class TestReading:
    def test_runs_that_are_there_already(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for name in ("mxfp8", "bf16", "delayed"):
            fake_train.train([f"fp8_recipe={name}", f"run_dir={tmp_path / 'c' / name}"], above=0.25)
        capsys.readouterr()
        paths = [str(tmp_path / "c" / name) for name in ("mxfp8", "bf16", "delayed")]
        told = compare_json(capsys, *paths)
        assert told["baseline"] == "bf16"  # the one that trained in it
        assert [run["loss_difference"] is None for run in told["runs"]] == [False, True, False]
        told = compare_json(capsys, *paths[::2], "--baseline", "delayed")
        assert told["baseline"] == "delayed"
        assert main(["compare", *paths, "--baseline", "nvfp4"]) == 2
        assert main(["compare", str(tmp_path)]) == 2
        assert main(["compare", *paths, "training.steps=2"]) == 2

    def test_a_recipe_schedule_counts_the_gemms_of_all_its_steps(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "run"
        fake_train.train(["fp8_recipe=mxfp8", f"run_dir={path}"], above=0.25)
        (path / "manifests").mkdir()
        bf16 = Manifest((high_precision_row("decoder.layers.0.mlp.linear_fc1", "outside_context"),), "bf16")
        mxfp8 = Manifest((mxfp8_row("decoder.layers.0.mlp.linear_fc1"),), "mxfp8")
        # Steps 1 to 5 in BF16, 6 to 17 in MXFP8 (a resumed run read it again in 9), then BF16; 21 never came.
        for step, manifest in ((1, bf16), (6, mxfp8), (9, mxfp8), (18, bf16), (21, mxfp8)):
            (path / "manifests" / f"step_{step:08d}.json").write_text(manifest.to_json())
        (path / "manifest.json").write_text(bf16.to_json())
        capsys.readouterr()
        (run,) = compare_json(capsys, str(path))["runs"]
        assert run["gemms"] == 3
        assert run["gemms_quantized"] == pytest.approx(3 * 12 / 20)
        assert [(one["recipe"], one["first_step"]) for one in run["recipes"]] == [
            ("bf16", 1),
            ("mxfp8", 6),
            ("bf16", 18),
        ]
        assert main(["compare", str(path)]) == 0
        told = capsys.readouterr().out
        assert "1.8 of 3 (60 %)" in told
        assert "bf16 from step 1, mxfp8 from step 6, bf16 from step 18; GEMMs quantised are the mean" in told

    def test_runs_that_differ_in_more_than_the_recipe_are_said_to(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        paths = [str(tmp_path / name) for name in ("bf16", "mxfp8", "delayed")]
        for path, more in zip(paths, ([], ["training.save_every=7"], ["training.seed=7"]), strict=True):
            recipe = Path(path).name
            fake_train.train([f"fp8_recipe={recipe}", f"run_dir={path}", *more], above=0.25)
        capsys.readouterr()
        assert compare_json(capsys, *paths[:2])["unlike"] == []
        assert compare_json(capsys, *paths)["unlike"] == ["training.seed"]
        assert main(["compare", *paths]) == 0
        assert "The runs differ in training.seed" in capsys.readouterr().out
        Path(paths[0], "config.yaml").write_text("a: [")
        assert main(["compare", *paths]) == 2
        assert "config.yaml cannot be read" in capsys.readouterr().err


@pytest.mark.slow
def test_two_real_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    """BF16 and MXFP8 train the same model on the same batches, and the GEMMs of one are quantised."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    overrides = [*SMALL, *SMALL_DATA, "training.steps=3", "training.eval_batches=1"]
    told = compare_json(capsys, "fp8_recipe=mxfp8", f"run_dir={tmp_path / 'c'}", *overrides)
    base, mxfp8 = told["runs"]
    first = [
        json.loads((tmp_path / "c" / name / "metrics.jsonl").read_text().splitlines()[0])["loss"]
        for name in ("bf16", "mxfp8")
    ]
    # The same weights and batch; only the GEMMs differ, which shows and is small.
    assert 0 < abs(first[0] - first[1]) < 0.02 * first[0]
    assert base["gemms_quantized"] == 0
    assert mxfp8["gemms_quantized"] == 2 * 4 * 3
    assert mxfp8["gemms"] == base["gemms"] == 2 * 4 * 3 + 3  # with the output layer
    assert mxfp8["loss_difference"] != 0.0
    assert mxfp8["held_out_difference"] != 0.0
    assert mxfp8["step_time_ratio"] > 0
