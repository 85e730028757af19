"""Two processes under torchrun with gloo: the job trains, and Transformer Engine's own reduction makes the
delayed scales of both equal."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from tests.training.command import Run, train

STEPS = 4
DELAYED = (
    "fp8_recipe=delayed",
    "fp8_recipe.amax_history_len=4",
    f"training.steps={STEPS}",
    "training.micro_batch_size=2",
    "training.global_batch_size=4",
    f"training.save_every={STEPS}",
)


def fp8_state(run: Run, rank: int, ranks: int = 2) -> dict[str, torch.Tensor]:
    """History and scales of the linears that Transformer Engine held on `rank`, from the last checkpoint."""
    path = run.path / "checkpoints" / f"step_{STEPS:06d}"
    metadata = FileSystemReader(path).read_metadata()
    (place,) = [
        place
        for index, place in metadata.storage_data.items()
        if index.fqn == f"rank_state/shard_{rank}_{ranks}"
    ]
    with (path / place.relative_path).open("rb") as file:
        file.seek(place.offset)
        (state,) = torch.load(io.BytesIO(file.read(place.length)), weights_only=True)
    return {name: tensor for name, tensor in state["fp8_state"].items() if ".linear_" in name}


def assert_equal_scales(run: Run) -> None:
    first, second = fp8_state(run, 0), fp8_state(run, 1)
    assert first.keys() == second.keys()
    assert len(first) == 8 * 2 * 2  # linears, directions, scale and history
    moved = 0
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        moved += int(name.endswith("/scale") and bool((tensor != 1).any()))
    assert moved == 8 * 2  # every scale has left its initial value


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tmp_path_factory.mktemp("single") / "run", *DELAYED)


def test_data_parallel_sees_the_same_batches_and_shares_amax(tmp_path: Path, single: Run) -> None:
    run = train(tmp_path / "run", *DELAYED, "optimizer.distributed_optimizer=true", ranks=2)
    assert_equal_scales(run)
    assert run.losses[0] == pytest.approx(single.losses[0], abs=1e-4)
    assert run.losses == pytest.approx(single.losses, rel=2e-3)
    assert run.output.count("run directory") >= 1
    assert run.output.count(f"step {STEPS}/{STEPS}") == 1  # rank 0 alone speaks


def test_tensor_parallel_with_sequence_parallel_shares_amax(tmp_path: Path, single: Run) -> None:
    run = train(tmp_path / "run", *DELAYED, "parallel.tp=2", "parallel.sequence=true", ranks=2)
    assert_equal_scales(run)
    assert run.losses[-1] < run.losses[0]
    assert run.losses[-1] == pytest.approx(single.losses[-1], rel=0.05)  # other initial weights


def test_pipeline_parallel_with_fp8_weights_resumes_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    settings = (*DELAYED, "fp8_recipe.fp8_param=true", "parallel.pp=2", "training.save_every=2")
    run = train(tmp_path / "run", *settings, ranks=2)
    losses, states = run.losses, [fp8_state(run, rank) for rank in (0, 1)]
    assert losses[-1] < losses[0]
    shutil.rmtree(run.path / "checkpoints" / f"step_{STEPS:06d}")  # go back to the one before it
    resumed = train(run.path, *settings, ranks=2, resume=True)
    assert "after step 2 of" in resumed.output
    assert resumed.losses == losses
    for rank, expected in enumerate(states):
        assert len(expected) == 4 * 2 * 2
        for name, tensor in fp8_state(resumed, rank).items():
            assert torch.equal(tensor, expected[name]), name


def test_processes_that_cannot_work_together_say_so_once(tmp_path: Path) -> None:
    failed = train(tmp_path / "run", *DELAYED, "parallel.tp=4", ranks=2, status=1)
    assert failed.errors.count("nemo-fp8: ") == 1
    assert "parallel.tp=4" in failed.errors
    assert not failed.path.exists()
