"""Which directory a job writes and where it goes on from, by `run_dir` and `training.resume`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nemo_fp8_recipes.errors import CheckpointError, ConfigError
from nemo_fp8_recipes.training.checkpoint.directory import newest_checkpoint
from nemo_fp8_recipes.training.files import writing
from nemo_fp8_recipes.training.run_directory import RUN_FILE, RunDirectory, newest_run

__all__ = ["Opening", "open_run"]


def _holds_a_run(directory: Path) -> bool:
    with writing(directory):  # a name may be one that no file system takes
        return (directory / RUN_FILE).exists()


@dataclass(frozen=True)
class Opening:
    """An open run directory and the checkpoint to start from, if any.

    `goes_on`: the directory holds a run already. Without a checkpoint that run starts again from its first
    step.
    """

    run: RunDirectory
    checkpoint: Path | None
    goes_on: bool = False


def open_run(
    run_dir: str | None,
    resume: str | None,
    recipe: str,
    newest: Callable[[Path], Path | None] = newest_checkpoint,
) -> Opening:
    """Open the run directory that the configuration asks for.

    - `resume` null: a new run in `run_dir` (or a fresh directory below `runs/`).
    - `resume=auto`: go on in `run_dir` from its newest checkpoint; start there when it holds no run yet, and
      start again there when its run ended before it saved anything, so that a requeued job can always say
      auto. A run that finished is not started again. Without `run_dir`, the newest run of this recipe below
      `runs/`, which must have a checkpoint: nobody named it.
    - `resume=PATH`: go on in that run directory.

    Args:
        run_dir, resume, recipe: what the configuration says.
        newest: finds the newest complete checkpoint below a run's checkpoints.

    Raises:
        RunDirectoryError: it cannot be created, written or locked, or holds another run.
        CheckpointError: there is nothing to resume from.
        ConfigError: `run_dir` and `training.resume` name two directories.
    """
    if resume is None:
        return Opening(RunDirectory.create(run_dir, recipe), None)
    if resume == "auto":
        if run_dir is not None and not _holds_a_run(Path(run_dir)):
            return Opening(RunDirectory.create(run_dir, recipe), None)
        path = Path(run_dir) if run_dir is not None else newest_run(recipe)
        if path is None:
            raise CheckpointError(
                f"training.resume=auto found no run with fp8_recipe={recipe} below runs/.",
                key="training.resume",
                value=resume,
                hint="Name the run directory: training.resume=PATH.",
            )
    else:
        path = Path(resume)
        if run_dir is not None and Path(run_dir).resolve() != path.resolve():
            raise ConfigError(
                f"run_dir={run_dir} and training.resume={resume} name two directories.",
                key="training.resume",
                value=resume,
                hint="A resumed run goes on in its own directory: leave run_dir out.",
            )
    run = RunDirectory.reopen(path)
    checkpoint = newest(run.checkpoints)
    starts_again = resume == "auto" and run_dir is not None and run.record["status"] != "finished"
    if checkpoint is None and not starts_again:
        run.close()
        raise CheckpointError(
            f"{path} has no complete checkpoint to resume from.",
            key="training.resume",
            value=str(path),
            hint="Checkpoints are saved when training.save_every is above 0.",
        )
    return Opening(run, checkpoint, goes_on=True)
