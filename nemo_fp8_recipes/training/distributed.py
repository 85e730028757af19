"""The processes of a job: torch.distributed, Megatron's parallel groups, seeds, and agreeing on errors."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from nemo_fp8_recipes.errors import Fp8Error
from nemo_fp8_recipes.training.errors import ReportedElsewhereError
from nemo_fp8_recipes.training.layout import ParallelSizes

__all__ = [
    "agree",
    "process_group",
    "rendezvous",
    "same_everywhere",
    "seed_everything",
    "together",
]

Result = TypeVar("Result")


@contextmanager
def process_group(sizes: ParallelSizes, *, on_gpu: bool, timeout_minutes: int) -> Iterator[torch.device]:
    """torch.distributed and Megatron's groups for the duration of the block; yields this rank's device."""
    from megatron.core import parallel_state

    with rendezvous(on_gpu=on_gpu, timeout_minutes=timeout_minutes) as device:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=sizes.tp,
            pipeline_model_parallel_size=sizes.pp,
            context_parallel_size=sizes.cp,
        )
        try:
            yield device
        finally:
            parallel_state.destroy_model_parallel()


@contextmanager
def rendezvous(*, on_gpu: bool, timeout_minutes: int) -> Iterator[torch.device]:
    """torch.distributed alone for the duration of the block; yields this rank's device.

    Under torchrun (RANK and WORLD_SIZE set) the rendezvous comes from the environment. Without it the job is
    one process, whose store lives in its own memory: no port is opened that another run could want."""
    backend = "nccl" if on_gpu else "gloo"
    timeout = datetime.timedelta(minutes=timeout_minutes)
    device = torch.device("cpu")
    if on_gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        yield device
    finally:
        if dist.is_initialized():  # a framework that failed may have taken it down
            dist.destroy_process_group()


def seed_everything(seed: int) -> None:
    """Seed torch and Megatron's random states: pipeline stages differ, data-parallel ranks do not."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed)


def agree(action: Callable[[], Result]) -> Result:
    """Run `action` on rank 0 and give every rank its result: plain data, since it is sent.

    Raises:
        Fp8Error: what `action` raised, on rank 0.
        ReportedElsewhereError: on the other ranks then.
    """
    if dist.get_world_size() == 1:
        return action()
    outcome: list[Any] = [None, None]
    failure: Fp8Error | None = None
    if dist.get_rank() == 0:
        try:
            outcome = [action(), None]
        except Fp8Error as error:
            failure, outcome = error, [None, str(error)]
    dist.broadcast_object_list(outcome, src=0)
    result, message = outcome
    if failure is not None:
        raise failure
    if message is not None:
        raise ReportedElsewhereError(message)
    return cast("Result", result)


def together(action: Callable[[], Result]) -> Result:
    """Run `action`, which must not communicate, on every rank; when it fails on one, all stop.

    Raises:
        Fp8Error: what `action` raised, on the first rank on which it did.
        ReportedElsewhereError: on the other ranks then.
    """
    if dist.get_world_size() == 1:
        return action()
    result: Result | None = None
    failure: Fp8Error | None = None
    try:
        result = action()
    except Fp8Error as error:
        failure = error
    messages: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, str(failure) if failure is not None else None)
    speaker = next((rank for rank, message in enumerate(messages) if message is not None), None)
    if speaker is None:
        return cast("Result", result)
    if failure is not None and speaker == dist.get_rank():
        raise failure
    raise ReportedElsewhereError(messages[speaker])


def same_everywhere(what: Mapping[str, Any]) -> None:
    """Check that all ranks hold equal values (data fingerprints, versions). Raises `Fp8Error` naming the
    first that differs."""
    if dist.get_world_size() == 1:
        return
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, dict(what))

    def compare() -> None:
        for key in what:
            values = {str(row[key]) for row in gathered}
            if len(values) > 1:
                raise Fp8Error(
                    f"The processes of this job differ in {key}: {', '.join(sorted(values))}.", key=key
                )

    agree(compare)
