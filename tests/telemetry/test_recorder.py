"""The recorder's side that needs no quantised model: which steps it logs, and what goes where when."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import nemo_fp8_recipes
from nemo_fp8_recipes import telemetry
from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.telemetry import store
from nemo_fp8_recipes.telemetry.exchange import Exchange
from nemo_fp8_recipes.telemetry.probes.base import Reading, ReadingSpec
from nemo_fp8_recipes.telemetry.recorder import Recorder
from nemo_fp8_recipes.telemetry.sinks import build
from tests.telemetry.examples import METADATA
from tests.telemetry.test_sinks import scalars


class Observed:
    """Stands for the observer: in step n it reads amax = n."""

    def __init__(self) -> None:
        self.recording = 0
        self.steps = 0
        self.abandoned = False
        self.reread: list[int] = []

    def begin(self, *, stats: bool) -> None:
        self.recording += 1
        if stats:
            self.reread.append(self.steps + 1)

    def end(self) -> Reading:
        self.recording -= 1
        self.steps += 1
        spec = ReadingSpec("m", "input", "amax", "delayed", "e4m3", "max")
        return Reading((spec,), torch.tensor([float(self.steps)]))

    def abandon(self) -> None:
        self.abandoned = True


def recorder(
    run_dir: Path, *, log_every: int = 1, flush_every: int = 1, stats_every: int = 0
) -> tuple[Recorder, Observed]:
    made = Recorder(
        torch.nn.Linear(1, 1),
        Exchange(None, writer=True),
        build(["parquet", "tensorboard"], run_dir, METADATA),
        log_every=log_every,
        flush_every=flush_every,
        history=True,
        stats_every=stats_every,
    )
    observed = Observed()
    made._observer = observed  # type: ignore[assignment]  # a stand-in for the part that needs a GPU library
    return made, observed


class NothingObserved(Observed):
    """Sees no quantised tensor."""

    def end(self) -> None:  # type: ignore[override]  # as the observer does then
        super().end()


@pytest.mark.parametrize(("quantising", "warned"), [((1, 2), [1]), ((2,), [2]), ((), [])])
def test_seeing_nothing_is_a_warning_only_where_the_recipe_quantises(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, quantising: tuple[int, ...], warned: list[int]
) -> None:
    made, _ = recorder(tmp_path)
    made._observer = NothingObserved()  # type: ignore[assignment]  # as above
    for step in (1, 2, 3):
        made.begin_step(step)
        made.quantises = step in quantising
        made.end_step(step)
    made.quantises = True  # the next step's recipe says nothing about the last one
    made.close()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(warned)
    assert all(f"no quantised tensor in step {step}" in "".join(said) for step in warned)


def test_what_is_seen_first_in_the_last_step_is_kept(tmp_path: Path) -> None:
    """The layout of the steps before it has no place for it."""
    made, observed = recorder(tmp_path)
    made._observer = NothingObserved()  # type: ignore[assignment]  # as above
    made.quantises = False
    train(made, 1, 1)
    made._observer = observed  # type: ignore[assignment]  # as above
    made.quantises = True
    train(made, 2, 2)
    made.close()
    assert steps_in(tmp_path) == [2]


def steps_in(run_dir: Path) -> list[int]:
    return sorted(store.read(run_dir).column("step").to_pylist())


def train(made: Recorder, first: int, last: int) -> None:
    for step in range(first, last + 1):
        made.begin_step(step)
        made.end_step(step, {"loss": float(step)})


def test_the_first_step_and_every_nth_are_logged(tmp_path: Path) -> None:
    made, _ = recorder(tmp_path, log_every=10)
    train(made, 1, 25)
    made.close()
    assert steps_in(tmp_path) == [1, 10, 20]
    assert list(scalars(tmp_path / "tensorboard")["train/loss"]) == list(range(1, 26))


def test_steps_that_read_the_tensors_are_logging_steps_too(tmp_path: Path) -> None:
    made, observed = recorder(tmp_path, log_every=10, stats_every=15)
    train(made, 1, 31)
    made.close()
    assert steps_in(tmp_path) == [1, 10, 15, 20, 30]
    assert observed.reread == [1, 3, 5]  # the first, third and fifth of them: 1, 15, 30


def test_values_belong_to_their_own_step(tmp_path: Path) -> None:
    made, _ = recorder(tmp_path)
    train(made, 1, 5)
    made.close()
    rows = store.read(tmp_path).to_pylist()
    assert {row["step"]: row["value"] for row in rows} == {n: float(n) for n in range(1, 6)}


def test_flushing_makes_the_last_step_readable(tmp_path: Path) -> None:
    made, _ = recorder(tmp_path, flush_every=100)
    train(made, 1, 3)
    assert steps_in(tmp_path) == []
    made.flush()
    assert steps_in(tmp_path) == [1, 2, 3]
    made.close()


def test_at_most_flush_every_logging_steps_are_held_back(tmp_path: Path) -> None:
    made, _ = recorder(tmp_path, flush_every=3)
    train(made, 1, 10)
    # Step 10 is still on its way from the device; of the nine before it three times three are written.
    assert steps_in(tmp_path) == list(range(1, 10))
    made.close()


@pytest.mark.parametrize("resume_at", [3, 7])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, resume_at: int) -> None:
    whole, _ = recorder(tmp_path / "whole")
    train(whole, 1, 9)
    whole.close()
    killed, _ = recorder(tmp_path / "resumed")
    train(killed, 1, 7)
    killed.flush()  # what a checkpoint does; the process is killed afterwards
    resumed, observed = recorder(tmp_path / "resumed")
    observed.steps = resume_at
    resumed.truncate_after(resume_at)
    train(resumed, resume_at + 1, 9)
    resumed.close()

    def rows(name: str) -> list[tuple[int, float]]:
        return sorted((row["step"], row["value"]) for row in store.read(tmp_path / name).to_pylist())

    assert rows("resumed") == rows("whole")


def test_closing_in_the_middle_of_a_step_cleans_up(tmp_path: Path) -> None:
    made, observed = recorder(tmp_path)
    train(made, 1, 2)
    made.begin_step(3)
    made.close()
    assert observed.abandoned
    assert steps_in(tmp_path) == [1, 2]
    made.close()


def test_bf16_logs_training_metrics_only(tmp_path: Path) -> None:
    made = telemetry.attach(torch.nn.Linear(1, 1), nemo_fp8_recipes.load("bf16"), directory=tmp_path)
    train(made, 1, 2)
    made.close()
    assert not (tmp_path / "telemetry").exists()
    assert list(scalars(tmp_path / "tensorboard")) == ["train/loss"]


def test_a_rank_that_does_not_write_leaves_nothing(tmp_path: Path) -> None:
    made = telemetry.attach(
        torch.nn.Linear(1, 1), nemo_fp8_recipes.load("mxfp8"), directory=tmp_path, is_writer=False
    )
    made.end_step(1, {"loss": 1.0})
    made.flush()
    made.close()
    assert list(tmp_path.iterdir()) == []


def test_an_impossible_interval_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="log_every"):
        telemetry.attach(
            torch.nn.Linear(1, 1), nemo_fp8_recipes.load("mxfp8"), directory=tmp_path, log_every=0
        )
