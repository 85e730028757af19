"""Run directories: created once, locked, truthful about their state, never half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_fp8_recipes.errors import CheckpointError, ConfigError, Fp8Error, RunDirectoryError
from nemo_fp8_recipes.report.run import load
from nemo_fp8_recipes.training.files import atomic_write_text
from nemo_fp8_recipes.training.metrics import MetricsLog, read_metrics
from nemo_fp8_recipes.training.resume import open_run
from nemo_fp8_recipes.training.run_directory import RunDirectory, newest_run

START = {
    "command": ["nemo-fp8", "train"],
    "overrides": ["fp8_recipe=mxfp8"],
    "recipe": {"name": "mxfp8"},
    "device": "emulated b200",
    "versions": {"torch": "2.13.0"},
    "config_yaml": "fp8_recipe: mxfp8\n",
}


def record(path: Path) -> dict:
    return json.loads((path / "run.json").read_text())


def started(path: Path, **changes: object) -> RunDirectory:
    run = RunDirectory.create(path, "mxfp8")
    run.start(**{**START, **changes})
    return run


def complete_checkpoint(run: RunDirectory, step: int) -> Path:
    path = run.checkpoints / f"step_{step:06d}"
    path.mkdir(parents=True)
    (path / "complete.json").write_text("{}")
    return path


def test_a_run_says_how_it_stands(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    assert record(run.path)["status"] == "running"
    assert record(run.path)["device"] == "emulated b200"
    assert (run.path / "config.yaml").read_text() == START["config_yaml"]
    run.finish({"last_loss": 2.0})
    assert record(run.path)["status"] == "finished"
    assert record(run.path)["result"] == {"last_loss": 2.0}
    assert record(run.path)["ended"]


def test_a_failed_run_names_its_error(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    run.fail(ValueError("no such thing"))
    assert record(run.path)["status"] == "failed"
    assert record(run.path)["error"] == "ValueError: no such thing"


def test_an_existing_run_is_never_overwritten(tmp_path: Path) -> None:
    started(tmp_path / "run").close()
    before = record(tmp_path / "run")
    with pytest.raises(RunDirectoryError, match="holds a run already") as caught:
        RunDirectory.create(tmp_path / "run", "mxfp8")
    assert "training.resume=" in str(caught.value)
    assert record(tmp_path / "run") == before


def test_other_files_are_not_mixed_with_a_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunDirectoryError, match=r"other files \(thesis.tex\)\. Choose another run_dir\.$"):
        RunDirectory.create(tmp_path, "mxfp8")
    assert sorted(os.listdir(tmp_path)) == ["thesis.tex"]


def test_a_second_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from nemo_fp8_recipes.training.run_directory import RunDirectory\n"
            "run = RunDirectory.create(sys.argv[1], 'mxfp8')\n"
            f"run.start(**{START!r})\n"
            "print('ready', flush=True); sys.stdin.read()",
            str(tmp_path / "run"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        for attempt in (RunDirectory.reopen, lambda path: RunDirectory.create(path, "mxfp8")):
            with pytest.raises(RunDirectoryError, match="in use by another process"):
                attempt(tmp_path / "run")
    finally:
        holder.kill()
        holder.communicate()
    RunDirectory.reopen(tmp_path / "run").close()  # kill -9 released the lock


def test_fresh_names_do_not_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [RunDirectory.create(None, "delayed") for _ in range(3)]
    assert len({run.path for run in runs}) == 3
    assert all(run.path.parent == tmp_path / "runs" for run in runs)
    assert all(run.path.name.startswith("delayed-") for run in runs)


def test_a_start_that_came_to_nothing_leaves_nothing(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "run", "mxfp8").close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", ["/proc/nemo-fp8-run", "/dev/null/run"])
def test_a_directory_that_cannot_be_written_is_one_clear_error(path: str) -> None:
    with pytest.raises(RunDirectoryError, match=path) as caught:
        RunDirectory.create(path, "mxfp8")
    assert caught.value.key == "run_dir"


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    log = MetricsLog(Path("/dev/full"))
    with pytest.raises(RunDirectoryError, match="No space left on device"):
        log.append({"step": 1, "loss": 2.0})


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        log.append({"step": step, "loss": 5.0 / step})
    with log.path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in read_metrics(log.path)] == [1, 2, 3]
    log.truncate_after(2)
    log.append({"step": 3, "loss": 1.0})
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2, 3]


def test_a_damaged_line_is_one_clear_error_for_a_resumed_run(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.path.write_bytes(b'{"step": 1}\n\xff\xfe\n')
    with pytest.raises(RunDirectoryError, match="line 2 is no JSON object with a step"):
        log.truncate_after(1)


def test_numbers_that_json_lacks_are_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    assert read_metrics(log.path) == [{"step": 1, "loss": None, "grad_norm": None}]


def test_resume_goes_on_from_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    complete_checkpoint(run, 2)
    newest = complete_checkpoint(run, 10)
    (run.checkpoints / "step_000011").mkdir()  # a save that was killed
    run.close()
    for resume, run_dir in [(str(run.path), None), ("auto", str(run.path))]:
        opening = open_run(run_dir, resume, "mxfp8")
        assert opening.checkpoint == newest
        opening.run.close()


def test_auto_without_a_directory_takes_the_newest_run_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, recipe in (("a", "mxfp8"), ("b", "mxfp8"), ("c", "delayed")):
        run = started(tmp_path / "runs" / name, recipe={"name": recipe})
        complete_checkpoint(run, 1)
        run.close()
    found = newest_run("mxfp8")
    assert found is not None
    assert found.name == "b"
    opening = open_run(None, "auto", "mxfp8")
    assert opening.run.path == tmp_path / "runs" / "b"
    opening.run.close()


def test_auto_starts_a_run_where_none_is(tmp_path: Path) -> None:
    opening = open_run(str(tmp_path / "new"), "auto", "mxfp8")
    assert opening.checkpoint is None
    opening.run.close()


@pytest.mark.parametrize("written", [0, 1])
def test_auto_starts_a_run_again_that_was_killed_while_it_began(
    tmp_path: Path, written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its first file was complete and before its second: whichever is there, it is no other's."""
    from nemo_fp8_recipes.training import run_directory

    class Killed(BaseException):
        pass

    files = []

    def until_killed(path: Path, text: str) -> None:
        if len(files) == written:
            raise Killed
        files.append(path.name)
        atomic_write_text(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(run_directory, "atomic_write_text", until_killed)
        patch.setattr(
            run_directory, "atomic_write_json", lambda path, value: until_killed(path, json.dumps(value))
        )
        run = RunDirectory.create(tmp_path / "run", "mxfp8")
        with pytest.raises(Killed):
            run.start(**START)
        os.close(run._lock)
    opening = open_run(str(tmp_path / "run"), "auto", "mxfp8")
    opening.run.start(**START)
    opening.run.close()
    assert (tmp_path / "run" / "config.yaml").read_text() == START["config_yaml"]


def test_auto_starts_a_run_again_that_ended_before_it_saved(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    run.close()  # killed: its record still says running
    opening = open_run(str(run.path), "auto", "mxfp8")
    assert (opening.checkpoint, opening.goes_on) == (None, True)
    opening.run.start(**START)
    opening.run.finish({"steps": 1})
    opening.run.close()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):  # nothing to do, nothing to lose
        open_run(str(run.path), "auto", "mxfp8")


def test_resume_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunDirectoryError, match=r"has no run\.json"):
        open_run(None, str(tmp_path), "mxfp8")
    with pytest.raises(CheckpointError, match="found no run"):
        open_run(None, "auto", "mxfp8")
    run = started(tmp_path / "run")
    run.close()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        open_run(None, str(run.path), "mxfp8")
    with pytest.raises(ConfigError, match="name two directories"):
        open_run(str(tmp_path / "other"), str(run.path), "mxfp8")
    (run.path / "run.json").write_text("{")
    with pytest.raises(RunDirectoryError, match=r"Cannot read"):
        open_run(None, str(run.path), "mxfp8")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"schema_version": 2},
            "it says 2. Allowed: 1. A newer nemo-fp8-recipes wrote it",
        ),
        ({"schema_version": 0}, "is not of schema version 1: it says 0. Allowed: 1."),
        ({"schema_version": None}, "it says null"),
        ({"recipe": None}, "it has no recipe"),
        ({"started": None, "status": 3}, "it has no status, started"),
        ({"resumes": None}, "it has no resumes"),
        ({"versions": [1], "result": 3}, "it has no versions, result"),
    ],
)
def test_a_record_of_another_form_says_what_is_wrong_with_it(
    tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    run = started(tmp_path / "run")
    run.close()
    (run.path / "run.json").write_text(json.dumps({**record(run.path), **changes}))
    for reading in (
        lambda: open_run(None, str(run.path), "mxfp8"),
        lambda: newest_run("mxfp8", tmp_path),
        lambda: load(run.path),
    ):
        with pytest.raises(Fp8Error) as raised:
            reading()
        assert said in str(raised.value)


@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_name_that_no_file_system_takes(tmp_path: Path, resume: str | None) -> None:
    with pytest.raises(RunDirectoryError, match=r"Cannot write .*: File name too long\. Choose"):
        open_run(str(tmp_path / ("x" * 300)), resume, "mxfp8")


def test_a_directory_that_is_not_there_is_told_from_one_that_holds_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"There is no directory .*nowhere\. nemo-fp8 runs lists"):
        open_run(None, str(tmp_path / "nowhere"), "mxfp8")
