"""A disk that is full while a run trains: one sentence, complete checkpoints; with room the run goes on."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training.command import command, environment, train

pytestmark = pytest.mark.slow

STEPS = 12
WORDS = ("fp8_recipe=delayed", f"training.steps={STEPS}", "training.save_every=3")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for two checkpoints and a half."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4500k", "tmpfs", tmp_path], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


def steps(path: Path) -> list[str]:
    return sorted(entry.name for entry in (path / "checkpoints").iterdir())


def test_a_full_disk_stops_the_run_and_with_room_it_goes_on(small_disk: Path) -> None:
    failed = train(small_disk / "run", *WORDS, status=2)
    line = failed.errors.splitlines()[-1]
    assert line.startswith(f"nemo-fp8: Cannot save {failed.path}/checkpoints/step_000009: ")
    assert "No space left on device. The newest that is complete is of step 6." in line
    assert line.endswith(f"training.resume={failed.path}")
    assert "Traceback" not in failed.errors
    assert steps(failed.path) == ["step_000003", "step_000006"]
    assert failed.record["status"] == "failed"
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    done = train(failed.path, *WORDS, resume=True)
    assert done.record["status"] == "finished"
    assert done.record["resumes"][0]["step"] == 6
    assert [row["step"] for row in done.metrics] == list(range(1, STEPS + 1))


def test_a_checkpoint_that_may_not_be_written_whole_is_one_sentence(tmp_path: Path) -> None:
    """A limit of the size of files, which needs no rights to set."""
    path = tmp_path / "run"
    done = subprocess.run(
        command(f"run_dir={path}", *WORDS, "telemetry.enabled=false"),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)),
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"nemo-fp8: Cannot save {path}/checkpoints/step_000003: ")
    assert "None is complete." in line
    assert steps(path) == []
