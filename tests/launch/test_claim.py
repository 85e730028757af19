"""A run directory is used only by who may use it, and nothing in it is lost."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest

from nemo_fp8_recipes.errors import RunDirectoryError
from nemo_fp8_recipes.launch.arguments import Payload
from nemo_fp8_recipes.launch.claim import claim, reserve
from nemo_fp8_recipes.launch.plan import Job, make_job


def _job(run_dir: Path, job_id: str, *overrides: str) -> Job:
    return make_job([f"run_dir={run_dir}", *overrides], Payload("train"), job_id=job_id)


def _finished_run(run_dir: Path, *, checkpoint: bool = False) -> None:
    """What a training job leaves."""
    run_dir.mkdir(parents=True, exist_ok=True)
    record = {"schema_version": 1, "status": "failed", "recipe": {"name": "mxfp8"}, "started": "2026-01-01"}
    (run_dir / "run.json").write_text(json.dumps(record))
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    if checkpoint:
        path = run_dir / "checkpoints" / "step_000001"
        path.mkdir(parents=True)
        (path / "complete.json").write_text("{}")


def _contents(directory: Path) -> set[bytes]:
    return {path.read_bytes() for path in directory.rglob("*") if path.is_file()}


PLAIN = {"resume": False, "overwrite": False, "requeued": False}


def test_a_fresh_directory_is_made_and_holds_nothing_but_hidden_files(tmp_path: Path) -> None:
    claimed = claim(_job(tmp_path / "run", "1"), ["x"], **PLAIN)
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == [".launch"]
    assert json.loads((tmp_path / "run/.launch/job.json").read_text())["job_id"] == "1"
    claimed.release()


def test_a_run_that_exists_is_not_touched(tmp_path: Path) -> None:
    _finished_run(tmp_path / "run")
    before = _contents(tmp_path)
    with pytest.raises(RunDirectoryError, match=r"holds a run already.*--resume.*--overwrite"):
        claim(_job(tmp_path / "run", "2"), ["x"], **PLAIN)
    assert before <= _contents(tmp_path)
    assert (tmp_path / "run" / "run.json").exists()


def test_other_peoples_files_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    for options in (PLAIN, {**PLAIN, "overwrite": True}, {**PLAIN, "resume": True}):
        with pytest.raises(RunDirectoryError, match=r"holds other files \(thesis.tex\)"):
            claim(_job(tmp_path, "1"), ["x"], **options)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_overwrite_puts_the_run_aside_and_deletes_nothing(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    claim(_job(run_dir, "1"), ["x"], **PLAIN).release()
    _finished_run(run_dir, checkpoint=True)
    before = _contents(run_dir) - {b""}
    claimed = claim(_job(run_dir, "2"), ["x"], **{**PLAIN, "overwrite": True})
    assert before <= _contents(run_dir)
    assert [entry.name for entry in run_dir.iterdir()] == [".launch"]
    assert (run_dir / ".launch/replaced/1/checkpoints/step_000001/complete.json").exists()
    assert (run_dir / ".launch/replaced/1/.launch/job.json").exists()
    assert claimed.notes
    claimed.release()
    _finished_run(run_dir)
    claim(_job(run_dir, "3"), ["x"], **{**PLAIN, "overwrite": True}).release()
    assert (run_dir / ".launch/replaced/2/run.json").exists()


def test_overwrite_waits_for_nobody_who_still_writes(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    _finished_run(run_dir)
    with (run_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunDirectoryError, match="in use"):
            claim(_job(run_dir, "2"), ["x"], **{**PLAIN, "overwrite": True})
    assert (run_dir / "run.json").exists()


def test_a_directory_whose_job_is_alive_is_refused_to_another_job_even_with_resume(tmp_path: Path) -> None:
    first = claim(_job(tmp_path / "run", "1"), ["x"], **PLAIN)
    with pytest.raises(RunDirectoryError, match="in use by job 1"):
        claim(_job(tmp_path / "run", "2"), ["x"], **{**PLAIN, "resume": True})
    first.release()
    claim(_job(tmp_path / "run", "2"), ["x"], **{**PLAIN, "resume": True}).release()


def test_another_node_of_the_same_job_joins(tmp_path: Path) -> None:
    first = claim(_job(tmp_path / "run", "1"), ["x"], **PLAIN)
    second = claim(_job(tmp_path / "run", "1"), ["x"], **PLAIN)
    first.release()
    second.release()


def test_the_same_id_again_after_its_end_is_no_new_job(tmp_path: Path) -> None:
    claim(_job(tmp_path / "run", "1"), ["x"], **PLAIN).release()
    with pytest.raises(RunDirectoryError, match="holds a run already"):
        claim(_job(tmp_path / "run", "1"), ["x"], **PLAIN)


def test_a_submitted_job_starts_in_the_directory_reserved_for_it(tmp_path: Path) -> None:
    job = _job(tmp_path / "run", "7")
    reserve(job, ["x"], resume=False, overwrite=False, extra={"slurm": {"job_id": "7"}})
    claimed = claim(job, ["y"], **PLAIN)
    record = json.loads((tmp_path / "run/.launch/job.json").read_text())
    assert (record["state"], record["command"], record["slurm"]) == ("started", ["x"], {"job_id": "7"})
    assert not claimed.resume
    claimed.release()


def test_a_requeued_job_goes_on_with_its_run(tmp_path: Path) -> None:
    job = _job(tmp_path / "run", "7")
    claim(job, ["x"], **PLAIN).release()
    _finished_run(tmp_path / "run", checkpoint=True)
    claimed = claim(job, ["x"], **{**PLAIN, "requeued": True})
    assert claimed.resume
    assert (tmp_path / "run/checkpoints/step_000001/complete.json").exists()
    claimed.release()


def test_a_requeued_job_without_a_checkpoint_starts_anew_beside_what_it_left(tmp_path: Path) -> None:
    job = _job(tmp_path / "run", "7")
    claim(job, ["x"], **PLAIN).release()
    _finished_run(tmp_path / "run")
    claimed = claim(job, ["x"], **{**PLAIN, "requeued": True})
    assert not (tmp_path / "run/run.json").exists()
    assert (tmp_path / "run/.launch/replaced/1/metrics.jsonl").exists()
    assert "starts anew" in claimed.notes[0]
    claimed.release()


def test_a_directory_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="Cannot write"):
        claim(_job(tmp_path / "file" / "run", "1"), ["x"], **PLAIN)
    with pytest.raises(RunDirectoryError, match="is a file"):
        claim(_job(tmp_path / "file", "1"), ["x"], **PLAIN)
