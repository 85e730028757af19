"""Saving and loading the whole state of a job, on all ranks together."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException  # no Exception, but a BaseException

from nemo_fp8_recipes.errors import CheckpointError
from nemo_fp8_recipes.recipes import Recipe
from nemo_fp8_recipes.recipes.schedule import Schedule
from nemo_fp8_recipes.training.checkpoint import directory as directories
from nemo_fp8_recipes.training.checkpoint import fp8_state, random_state, safe_load
from nemo_fp8_recipes.training.distributed import agree
from nemo_fp8_recipes.training.files import writing

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

__all__ = ["Checkpointer", "Position", "verify"]

# Megatron's names for how sharded states are laid out. Sharding by data-parallel bucket needs no gather when
# saving.
LAYOUT = {"distrib_optim_sharding_type": "dp_reshardable", "chained_optim_avoid_prefix": True}


@dataclass(frozen=True)
class Position:
    """How far the job is: completed optimizer steps and consumed training sequences."""

    step: int = 0
    consumed: int = 0


def verify(path: Path, job: Mapping[str, Any]) -> None:
    """Check that the checkpoint in `path` is complete, of this `job`, safe to load and intact, reading its
    files shared out over the ranks. Collective: raises on every rank or on none.

    Raises:
        CheckpointError: it is not; says which and why.
    """

    def inspect() -> dict[str, dict[str, Any]]:
        marker = directories.read_marker(path)
        directories.require_same_job(path, marker.job, job)
        return marker.files

    files = agree(inspect)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    own = [name for index, name in enumerate(files) if index % ranks == rank]
    damage = directories.find_damage(path, {name: files[name] for name in own})
    found: list[Any] = [None] * ranks
    dist.all_gather_object(found, damage)
    agree(lambda: directories.require_intact(path, [text for text in found if text]))
    agree(lambda: safe_load.check_metadata(path))


_NO_ROOM = 1 << 20  # bytes: what a file system that is full may still call free


def _why(error: BaseException, place: Path) -> str:
    """The reason in the operating system's words where it is known. The writer of torch's files covers it up
    with one of its own, and what another rank raised arrives without its cause."""
    failures = error.failures.values() if isinstance(error, CheckpointException) else ()
    first: BaseException = next((failure for failure, _ in failures), error)
    link: BaseException | None = first
    while link is not None:
        if isinstance(link, OSError) and link.strerror:
            return link.strerror
        link = link.__cause__ or link.__context__
    if shutil.disk_usage(place).free < _NO_ROOM:
        return os.strerror(errno.ENOSPC)
    return str(first).rstrip(".")


@dataclass(frozen=True)
class Checkpointer:
    """Saves and loads model, optimizer, schedule, data position, random states and delayed-scaling state.

    `job` is what must be the same when resuming: dotted key -> plain value. The number of processes is among
    it: random and scaling states belong to a rank."""

    checkpoints: Path
    model: GPTModel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    schedule: Schedule
    device: torch.device
    job: dict[str, Any]
    versions: dict[str, str | None]
    keep: int

    def save(self, position: Position, recipe: Recipe) -> Path:
        """Write `checkpoints/step_XXXXXX`; it counts only once its marker is there. Collective.

        Args:
            position: what the job has done.
            recipe: the recipe of its last step.

        Raises:
            CheckpointError: it cannot be written; earlier checkpoints are as they were.
        """
        from megatron.core import dist_checkpointing

        from nemo_fp8_recipes.training.checkpoint.save_strategy import save_strategy

        path = directories.checkpoint_path(self.checkpoints, position.step)
        agree(lambda: self._prepare(path))
        state = self._sharded_state(is_loading=False)
        state["common"] = {
            "step": position.step,
            "consumed": position.consumed,
            "scheduler": self.scheduler.state_dict(),
            "recipe": json.dumps(recipe.to_dict()),
        }
        try:
            dist_checkpointing.save(
                state, str(path), sharded_strategy=save_strategy(), content_metadata=dict(LAYOUT)
            )
        except (
            OSError,
            RuntimeError,
            CheckpointException,
            dist_checkpointing.core.CheckpointingException,
        ) as error:
            refused = self._cannot_save(path, error)
            shutil.rmtree(path, ignore_errors=True)  # incomplete either way: it has no marker
            raise refused from error
        self._complete(path, position)
        return path

    def load(self, path: Path) -> Position:
        """Put the state saved in `path`, which `verify` has passed, in place. Collective; before the first
        forward pass.

        Raises:
            CheckpointError: it cannot be loaded into this model.
        """
        from megatron.core import dist_checkpointing
        from megatron.core.safe_globals import register_safe_globals

        register_safe_globals()
        try:
            with safe_load.weights_only():
                state = dist_checkpointing.load(self._sharded_state(is_loading=True), str(path))
            self._put(state)
        except (
            OSError,
            RuntimeError,
            KeyError,
            ValueError,
            pickle.UnpicklingError,
            dist_checkpointing.core.CheckpointingException,
        ) as error:
            raise CheckpointError(f"Cannot load {path}: {error}.", value=str(path)) from error
        common = state["common"]
        return Position(step=common["step"], consumed=common["consumed"])

    # -- saving ------------------------------------------------------------------------------------------

    def _prepare(self, path: Path) -> None:
        """An empty directory at `path`, in the place of what a save that did not end left there."""
        with writing(path):
            if path.exists():
                (path / directories.MARKER).unlink(missing_ok=True)
                shutil.rmtree(path)
            path.mkdir(parents=True)

    def _cannot_save(self, path: Path, error: BaseException) -> CheckpointError:
        newest = directories.newest_complete_step(self.checkpoints)
        kept = (
            f"The newest that is complete is of step {newest}" if newest is not None else "None is complete"
        )
        return CheckpointError(
            f"Cannot save {path}: {_why(error, self.checkpoints)}. {kept}.",
            key="training.save_every",
            value=str(path),
            hint=f"If the disk is full, make room, then go on: training.resume={self.checkpoints.parent}",
        )

    def _complete(self, path: Path, position: Position) -> None:
        """Digest the files, each rank its own, and let rank 0 write the marker and delete old checkpoints."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        names = sorted(file.name for file in path.iterdir())
        own = [name for index, name in enumerate(names) if index % ranks == rank]
        digests: list[Any] = [None] * ranks
        dist.all_gather_object(digests, directories.digest_files(path, own))

        def write() -> None:
            files = {name: entry for part in digests for name, entry in part.items()}
            directories.write_marker(
                path, directories.CompleteMarker(position.step, self.job, self.versions, files)
            )
            directories.prune(self.checkpoints, keep=self.keep, newest=position.step)

        agree(write)

    # -- loading -----------------------------------------------------------------------------------------

    def _put(self, state: dict[str, Any]) -> None:
        own = state["rank"]
        recipe = self._saved_with(state["common"])
        # Before the weights: loading FP8 weights quantises, with the scales that must be in place by then.
        fp8_state.restore(self.model, recipe, own["fp8_state"])
        empty = {
            key: torch.empty(0, dtype=torch.uint8)
            for key in self.model.state_dict()
            if key.endswith(fp8_state.EXTRA_STATE)
        }
        self.model.load_state_dict({**state["model"], **empty})
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["common"]["scheduler"])
        # After them: quantising the loaded FP8 weights has added to the live amax.
        fp8_state.restore(self.model, recipe, own["fp8_state"])
        random_state.restore(own["random_state"], self.device)

    def _saved_with(self, common: dict[str, Any]) -> Recipe:
        """The recipe of the step that was saved: the schedule may change what comes, not what was."""
        recipe = self.schedule.at(common["step"])
        saved = common.get("recipe")  # checkpoints from before there were schedules have none
        if saved is not None and saved != json.dumps(recipe.to_dict()):
            name = json.loads(saved)["name"]
            options = " with other options" if name == recipe.name else ""
            raise CheckpointError(
                f"Step {common['step']} was trained with the recipe {name}, and recipe_schedule now gives it "
                f"{recipe.name}{options}.",
                key="recipe_schedule",
                hint="Change the recipe of later steps only. Where alerts.callback changed it, say in "
                "recipe_schedule from which step on.",
            )
        return recipe

    # -- both --------------------------------------------------------------------------------------------

    def _sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        from megatron.core.dist_checkpointing.mapping import ShardedObject

        model = fp8_state.without_extra_state(self.model.sharded_state_dict(metadata=LAYOUT))
        own = None
        if not is_loading:
            own = {
                "fp8_state": fp8_state.collect(self.model),
                "random_state": random_state.collect(self.device),
            }
        return {
            "model": model,
            "optimizer": self.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=LAYOUT),
            "rank": ShardedObject("rank_state", own, (dist.get_world_size(),), (dist.get_rank(),)),
        }
