"""Checkpoint directories: complete or not, intact or not, safe or not."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest
import torch

from nemo_fp8_recipes.errors import CheckpointError
from nemo_fp8_recipes.training.checkpoint import directory as checkpoints
from nemo_fp8_recipes.training.checkpoint import safe_load

JOB = {"model.num_layers": 2, "fp8_recipe.name": "delayed", "training.seed": 1}


def save(parent: Path, step: int, content: bytes = b"weights") -> Path:
    """A directory as a finished save leaves it."""
    path = checkpoints.checkpoint_path(parent, step)
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(content)
    (path / "common.pt").write_bytes(b"common")
    files = checkpoints.digest_files(path, ["__0_0.distcp", "common.pt"])
    checkpoints.write_marker(path, checkpoints.CompleteMarker(step, JOB, {"torch": "2"}, files))
    return path


def test_only_a_marked_directory_is_a_checkpoint(tmp_path: Path) -> None:
    assert checkpoints.newest_checkpoint(tmp_path / "none") is None
    older = save(tmp_path, 9)
    newer = save(tmp_path, 1_000_000)
    assert checkpoints.newest_checkpoint(tmp_path) == newer
    (newer / "complete.json").unlink()  # as a save that was killed leaves it
    assert checkpoints.newest_checkpoint(tmp_path) == older
    with pytest.raises(CheckpointError, match="its save did not end"):
        checkpoints.read_marker(newer)


def test_pruning_keeps_the_newest_complete_ones_and_what_it_does_not_know(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    (tmp_path / "step_000005").mkdir()  # incomplete
    (tmp_path / "notes").mkdir()
    checkpoints.prune(tmp_path, keep=2, newest=4)
    assert sorted(os.listdir(tmp_path)) == ["notes", "step_000003", "step_000004"]


def test_checkpoints_that_may_not_be_read_are_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "checkpoints", 3)

    def refused(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_file", refused)
        with pytest.raises(CheckpointError, match=r"Cannot read .*complete\.json: Permission denied\."):
            checkpoints.newest_checkpoint(tmp_path / "checkpoints")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", refused)
        with pytest.raises(CheckpointError, match=r"Cannot read .*checkpoints: Permission denied\."):
            checkpoints.newest_complete_step(tmp_path / "checkpoints")


def test_what_cannot_be_deleted_does_not_end_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process reads an old checkpoint, or it became somebody else's."""
    for step in (1, 2, 3):
        save(tmp_path, step)
    with monkeypatch.context() as patch:

        def busy(path: object, *_: object, **__: object) -> None:
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))

        for name in ("rmdir", "unlink"):
            patch.setattr(os, name, busy)
        checkpoints.prune(tmp_path, keep=1, newest=3)
    assert checkpoints.newest_complete_step(tmp_path) == 3
    checkpoints.prune(tmp_path, keep=1, newest=3)
    assert os.listdir(tmp_path) == ["step_000003"]


def test_an_old_checkpoint_that_cannot_be_looked_into_does_not_end_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    is_file = Path.is_file

    def refused(path: Path) -> bool:
        if path.parent.name == "step_000001":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refused)
    checkpoints.prune(tmp_path, keep=1, newest=3)
    assert "step_000001/complete.json: Permission denied" in caplog.text
    assert "step_000003" in os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: (path / "__0_0.distcp").write_bytes(b"weightz"), "has other content"),
        (lambda path: (path / "__0_0.distcp").write_bytes(b"weig"), "has 4 bytes instead of 7"),
        (lambda path: (path / "common.pt").unlink(), "common.pt is missing"),
    ],
)
def test_damage_is_found_and_named(tmp_path: Path, damage, says: str) -> None:
    path = save(tmp_path, 3)
    files = checkpoints.read_marker(path).files
    assert checkpoints.find_damage(path, files) is None
    damage(path)
    found = checkpoints.find_damage(path, files)
    assert found is not None
    assert says in found
    with pytest.raises(CheckpointError, match="is corrupt") as caught:
        checkpoints.require_intact(path, [found])
    assert "Delete that directory" in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 99}', '{"schema_version": 1}'])
def test_a_marker_that_cannot_be_read_is_a_checkpoint_error(tmp_path: Path, text: str) -> None:
    path = save(tmp_path, 3)
    (path / "complete.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"complete\.json"):
        checkpoints.read_marker(path)


@pytest.mark.parametrize("step", [2, 99])
def test_a_marker_of_another_step_than_its_directory_is_refused(tmp_path: Path, step: int) -> None:
    """Metrics and telemetry would be cut at one step, and the training go on from the other."""
    path = save(tmp_path, step)
    renamed = checkpoints.checkpoint_path(tmp_path, 3)
    path.rename(renamed)
    with pytest.raises(CheckpointError, match=rf"is corrupt: complete\.json is of step {step}\. Delete"):
        checkpoints.read_marker(renamed)


def test_a_damaged_checkpoint_says_from_where_one_can_go_on_without_it(tmp_path: Path) -> None:
    for step, hint in ((5, "is no older one that is complete"), (7, "to go on from step 5"), (9, "step 7")):
        path = save(tmp_path, step)
        with pytest.raises(CheckpointError, match=f"Delete that directory .*{hint}"):
            checkpoints.require_intact(path, ["x is missing"])


def test_another_configuration_is_refused_naming_what_differs(tmp_path: Path) -> None:
    checkpoints.require_same_job(tmp_path, JOB, dict(JOB))
    with pytest.raises(CheckpointError, match=r"model\.num_layers was 2, is 4") as caught:
        checkpoints.require_same_job(tmp_path, JOB, {**JOB, "model.num_layers": 4})
    assert caught.value.key == "model.num_layers"
    with pytest.raises(CheckpointError, match=r"fp8_recipe\.margin was None, is 1"):
        checkpoints.require_same_job(tmp_path, JOB, {**JOB, "fp8_recipe.margin": 1})


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


def test_metadata_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match="not safe to load"):
        safe_load.check_metadata(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"\x80", b"not a pickle", pickle.dumps([1])[:-2]])
def test_metadata_that_is_no_pickle_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError):
        safe_load.check_metadata(tmp_path)


def test_objects_that_would_run_code_are_refused_even_when_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "object.pt"
    torch.save([Payload(tmp_path / "ran")], file)
    with safe_load.weights_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=False)
    assert not (tmp_path / "ran").exists()
    assert safe_load.FORCE_WEIGHTS_ONLY not in os.environ


def test_torchs_opposite_switch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(safe_load.FORCE_UNRESTRICTED, "1")
    with pytest.raises(CheckpointError, match="lets checkpoints run code"), safe_load.weights_only():
        pass


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"schema_version": 1, "st', "complete.json is no JSON object"),
        ("\x00\xff", "complete.json is no JSON object"),
        ("[]", "complete.json is no JSON object"),
        ("{}", "complete.json has no schema_version"),
        ('{"schema_version": 1, "step": 2, "job": {}, "versions": {}}', "complete.json has no files"),
        ('{"schema_version": 1, "step": 2, "job": {}, "versions": {}, "files": []}', "has no files"),
        ('{"schema_version": 1, "step": 2, "job": {}, "versions": {}, "files": {}}', "has no files"),
        *(
            (
                '{"schema_version": 1, "step": 2, "job": {}, "versions": {}, "files": {"a": ' + entry + "}}",
                "complete.json does not say what a was",
            )
            for entry in ("null", "{}", '{"bytes": 1}', '{"bytes": "1", "blake2b": "x"}')
        ),
    ],
)
def test_a_damaged_marker_says_what_to_do(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "complete.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"is corrupt: .*Delete that directory") as caught:
        checkpoints.read_marker(tmp_path)
    assert said in str(caught.value)
