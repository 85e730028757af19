"""What every rank runs to show what telemetry says of quantised parameters whose high-precision copies are
cut between the data-parallel ranks.

Beside it each rank puts the whole copies together again: in the order of the data-parallel ranks, whose
pieces lie one behind the other. Where they belong is known from that, and not from where telemetry looks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

import nemo_fp8_recipes
from nemo_fp8_recipes import telemetry
from nemo_fp8_recipes.injection.module_names import named_modules
from nemo_fp8_recipes.telemetry.coded import Coded
from nemo_fp8_recipes.telemetry.probes.index import IndexCache
from nemo_fp8_recipes.telemetry.probes.stored import in_order, scale_inverses, stored
from nemo_fp8_recipes.telemetry.seam import is_quantized
from nemo_fp8_recipes.telemetry.shares import shares
from tests.support.gpt import Trainer
from tests.telemetry.elements_oracle import bulk_limit, measured, values

COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast",
               "broadcast_object_list", "reduce", "gather", "barrier")  # fmt: skip


def run(name: str, options: dict[str, Any], out: Path, *, steps: int) -> dict[str, Any]:
    """One configuration. Every rank calls this.

    Returns:
        oracle: [step, module, what `measured` says of the whole weight of this tensor-parallel rank].
        pieces: module -> first element, length and row length of what is here.
        agrees: the optimizer says the same of where they begin.
        collectives: of telemetry, in each step.
        shard, replica: which shard of each weight is here, and which one of the ranks that share it this is.
    """
    trainer = Trainer(**options)
    recipe = nemo_fp8_recipes.load(
        trainer.recipe, **({"amax_history_len": 4} if trainer.recipe == "delayed" else {})
    )
    weights = {
        named.path: weight
        for named in named_modules(trainer.model)
        for weight in named.module.parameters(recurse=False)
        if is_quantized(weight)
    }
    recorder = telemetry.attach(
        trainer.model,
        recipe,
        directory=out / name / f"rank{dist.get_rank()}",
        log_every=1,
        stats_every=1,
        sinks=["parquet"],
        alerts=None,
    )
    oracle: list[list[Any]] = []
    collectives: list[list[str]] = []
    for step in range(1, steps + 1):
        _tamper(weights, last=step == steps)
        for path, weight in weights.items():
            source = _whole(weight)
            coded = _in_order(stored(weight._quantizer, weight))
            inverses = scale_inverses(coded.scales, coded.amax).numpy()
            by_te = weight.detach().dequantize(dtype=torch.float32).numpy()
            assert np.array_equal(values(coded, inverses), by_te, equal_nan=True)
            bulk = bulk_limit(coded, inverses)
            oracle.append([step, path, measured(source.to(weight.dtype), coded, inverses, bulk)])
        with _counted() as calls:
            recorder.begin_step(step)
        trainer.step()
        with _counted(calls):
            recorder.end_step(step)
        collectives.append(calls)
    recorder.flush()
    recorder.close()
    dist.barrier()
    known = {id(weight): share for weight, share in shares(trainer.model)}
    optimizers = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
    ranges = {
        id(weight): optimizer._get_model_param_range_map(weight)["param"]
        for optimizer in optimizers
        for weight in weights.values()
        if weight in optimizer.model_param_gbuf_map
    }
    return {
        "oracle": oracle,
        "pieces": {
            path: [known[id(weight)].first, weight.main_param.numel(), weight.shape[-1]]
            for path, weight in weights.items()
            if weight.main_param is not None
        },
        "agrees": {key: (share.first, share.last) for key, share in known.items()}
        == {key: (found.start, found.end) for key, found in ranges.items()},
        "collectives": collectives,
        "shard": parallel_state.get_tensor_model_parallel_rank(),
        "replica": {path: dist.get_rank(_group(weight)) for path, weight in weights.items()},
    }


def _group(weight: Any) -> Any:
    """The ranks that share the optimizer's copy of a weight."""
    if getattr(weight, "allreduce", True):
        return parallel_state.get_data_parallel_group(with_context_parallel=True)
    return parallel_state.get_expert_data_parallel_group()


def _whole(weight: Any) -> torch.Tensor:
    """The copies of all ranks together, fp32 of the weight's shape."""
    mine = weight.main_param
    pieces: list[Any] = [None] * dist.get_world_size(_group(weight))
    dist.all_gather_object(pieces, None if mine is None else mine.detach().clone(), group=_group(weight))
    return torch.cat([piece.reshape(-1) for piece in pieces if piece is not None]).view(weight.shape)


def _tamper(weights: dict[str, Any], *, last: bool) -> None:
    """Copies of which some elements are zero, far above or far below what the codes stand for; and in the
    last step no numbers, on some ranks more than on others.
    """
    for weight in weights.values():
        if weight.main_param is None:
            continue
        values = weight.main_param.detach().view(-1)
        values[::5] = 0.0
        values[1::501] *= 100.0
        values[2::7] *= 1e-3
        if last:
            values[3 : 4 + dist.get_rank()] = torch.nan
            values[-1] = torch.inf


def _in_order(coded: Coded | None) -> Coded:
    assert coded is not None
    return in_order(coded, IndexCache())


@contextmanager
def _counted(calls: list[str] | None = None) -> Iterator[list[str]]:
    """The collectives that are called meanwhile, by name; added to `calls`."""
    found: list[str] = [] if calls is None else calls
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def watched(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            found.append(name)
            return originals[name](*args, **kwargs)

        return call

    try:
        for name in COLLECTIVES:
            setattr(dist, name, watched(name))
        yield found
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
