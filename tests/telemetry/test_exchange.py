"""The exchange between ranks: exact values, one collective, and no rank waits for a module it lacks."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from hypothesis import given
from hypothesis import strategies as st

from nemo_fp8_recipes.telemetry import exchange as exchange_module
from nemo_fp8_recipes.telemetry.codec import ABSENT, decode, encode
from nemo_fp8_recipes.telemetry.exchange import Exchange
from nemo_fp8_recipes.telemetry.layout import Layout
from nemo_fp8_recipes.telemetry.probes.base import COUNT, SHARED_BY, Reading, ReadingSpec

CPU = torch.device("cpu")
floats = st.floats(width=32, allow_nan=True, allow_infinity=True)


def spec(module: str, name: str = "amax", combine: str = "max", length: int = 1) -> ReadingSpec:
    return ReadingSpec(module, "input", name, "delayed", "e4m3", combine, length=length)  # type: ignore[arg-type]


def codes(values: list[float], *, minimum: bool) -> np.ndarray:
    tensor = torch.tensor(values, dtype=torch.float32)
    return encode(tensor, torch.full(tensor.shape, minimum)).numpy()


@given(st.lists(floats, min_size=1, max_size=20), st.booleans())
def test_encoding_keeps_every_bit(values: list[float], minimum: bool) -> None:
    back = decode(codes(values, minimum=minimum), np.full(len(values), minimum))
    wanted = np.asarray(values, dtype=np.float32)
    nan = np.isnan(wanted)
    assert np.array_equal(np.isnan(back), nan)
    assert np.array_equal(back[~nan].view(np.int32), wanted[~nan].view(np.int32))


@given(floats, floats)
def test_the_largest_code_is_the_extreme_value_and_nan_wins(a: float, b: float) -> None:
    for minimum, extreme in ((False, np.maximum), (True, np.minimum)):
        largest = codes([a, b], minimum=minimum).max(keepdims=True)
        found = decode(largest, np.asarray([minimum]))[0]
        wanted = extreme(np.float32(a), np.float32(b))
        assert (np.isnan(found) and np.isnan(wanted)) or found == wanted


def test_a_single_process_gets_its_own_values() -> None:
    exchange = Exchange(None, writer=True)
    specs = (spec("b"), spec("a", "scale", "min"), spec("a", "amax_history", length=3))
    reading = Reading(specs, torch.tensor([1.0, 2.0, 3.0, 4.0, float("nan")]))
    found = exchange.start(reading, CPU).result()
    assert found[specs[0]].tolist() == [1.0]
    assert found[specs[1]].tolist() == [2.0]
    assert found[specs[2]][:2].tolist() == [3.0, 4.0]
    assert np.isnan(found[specs[2]][2])


def test_what_was_not_read_this_time_is_left_out() -> None:
    exchange = Exchange(None, writer=True)
    exchange.start(Reading((spec("a"), spec("b")), torch.tensor([1.0, 2.0])), CPU).result()
    assert set(exchange.start(Reading((spec("b"),), torch.tensor([3.0])), CPU).result()) == {spec("b")}
    assert exchange.start(None, CPU).result() == {}


def test_something_new_is_not_lost() -> None:
    exchange = Exchange(None, writer=True)
    exchange.start(Reading((spec("a"),), torch.tensor([1.0])), CPU).result()
    later = exchange.start(Reading((spec("a"), spec("z")), torch.tensor([2.0, 3.0])), CPU).result()
    assert {s.module: v.tolist() for s, v in later.items()} == {"a": [2.0], "z": [3.0]}


# -- several ranks


def test_a_mean_over_blocks_is_weighed_with_the_blocks_of_each_rank() -> None:
    mean, rms, count = (
        spec("m", "scale_inv_mean", "mean"),
        spec("m", "scale_inv_rms", "rms"),
        spec("m", COUNT, "mean"),
    )
    empty = [one._replace(module="empty") for one in (mean, rms, count)]
    layout = Layout.of([mean, rms, count, *empty], 3)
    places = np.full(layout.size, ABSENT, dtype=np.int32)
    values = {mean: [1.0, 4.0], rms: [1.0, 4.0], count: [300.0, 100.0], **{one: [0.0, 0.0] for one in empty}}
    for one, numbers in values.items():  # the third rank has none of them
        places[layout.starts[one] : layout.starts[one] + 2] = codes(numbers, minimum=False)
    found = layout.found(places)
    assert found[mean] == np.float32(1.75)
    assert found[rms] == np.float32(np.sqrt((300 * 1 + 100 * 16) / 400))
    assert [found[one] for one in empty] == [0.0, 0.0, 0.0]


def test_parts_are_added_up_where_they_are_shared_and_the_largest_sum_counts() -> None:
    """Two shards, each shared by two of five ranks, the fifth a replica of one of them; and an operand of
    which one rank alone has a part.
    """
    number, by = spec("m", "nonfinite", "parts"), spec("m", SHARED_BY, "mean")
    lone, lone_by = number._replace(module="lone"), by._replace(module="lone")
    absent, absent_by = number._replace(module="absent"), by._replace(module="absent")
    layout = Layout.of([number, by, lone, lone_by, absent, absent_by], 5)
    places = np.full(layout.size, ABSENT, dtype=np.int32)
    values = {number: [1.0, 5.0, 3.0, 2.0, 3.0], by: [0.0, 1.0, 0.0, 1.0, 4.0], lone: [7.0], lone_by: [3.0]}
    for one, numbers in values.items():
        first = layout.starts[one] + (3 if one.module == "lone" else 0)
        places[first : first + len(numbers)] = codes(numbers, minimum=False)
    found = layout.found(places)
    assert (found[number], found[lone]) == (7.0, 7.0)
    assert absent not in found.specs


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _rank(rank: int, world_size: int, port: int, body: Callable[..., Any], directory: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        torch.save(body(rank), directory / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_ranks(body: Callable[..., Any], directory: Path, world_size: int = 2) -> list[Any]:
    """What `body(rank)` returns on each rank of a gloo group."""
    torch.multiprocessing.spawn(
        _rank, args=(world_size, _free_port(), body, directory), nprocs=world_size, join=True
    )
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _combine(rank: int) -> dict[str, list[float]]:
    exchange = Exchange(None, writer=rank == 0)
    specs = (
        spec("shared"),
        spec("shared", "scale", "min"),
        spec("shared", "scale_inv_mean", "mean"),
        spec(f"stage{rank}"),
        spec("agreed", "scale", "min"),
    )
    reading = Reading(specs, torch.tensor([1.0 + rank, 5.0 + rank, 2.0 + 2 * rank, 10.0 + rank, 7.0]))
    return {f"{s.module}.{s.name}": v.tolist() for s, v in exchange.start(reading, CPU).result().items()}


def _everything(rank: int) -> tuple[Any, Any, Any, Any]:
    return _combine(rank), _late_and_empty(rank), _count(rank), _same(rank)


def _same(rank: int) -> list[tuple[Any, ...]]:
    """What every rank gets of the second rank's values, which writes."""
    exchange = Exchange(None, writer=rank == 1)
    return [exchange.same_everywhere(value if rank == 1 else (), CPU) for value in ((), ("a", 2), ())]


def test_every_rank_hears_what_the_writer_says(ranks: list[Any]) -> None:
    for found in ranks:
        assert found[3] == [(), ("a", 2), ()]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """What two ranks found; one pair of processes for all tests, because starting them takes seconds."""
    return run_ranks(_everything, tmp_path_factory.mktemp("ranks"))


def test_ranks_combine_shards_and_stages_on_the_writer(ranks: list[Any]) -> None:
    writer, other = (found[0] for found in ranks)
    assert writer == {
        "shared.amax": [2.0],
        "shared.scale": [5.0],
        "shared.scale_max": [6.0],  # the ranks disagree on this one
        "agreed.scale": [7.0],
        "shared.scale_inv_mean": [3.0],
        "stage0.amax": [10.0],
        "stage1.amax": [11.0],
    }
    assert other == {}


def _late_and_empty(rank: int) -> list[dict[str, list[float]]]:
    """Rank 1 has nothing at first and something new later; the ranks take the same steps."""
    exchange = Exchange(None, writer=rank == 0)
    mine = Reading((spec("a"),), torch.tensor([1.0])) if rank == 0 else None
    late = Reading((spec("expert"),), torch.tensor([7.0])) if rank == 1 else mine
    steps = [mine, mine, late, late, None]
    return [
        {s.module: v.tolist() for s, v in exchange.start(reading, CPU).result().items()} for reading in steps
    ]


def test_a_rank_without_modules_does_not_block(ranks: list[Any]) -> None:
    writer = ranks[0][1]
    both = {"a": [1.0], "expert": [7.0]}
    assert writer == [{"a": [1.0]}, {"a": [1.0]}, both, both, {}]


def _count(rank: int) -> list[dict[str, int]]:
    counts: dict[str, int] = {}
    for name in ("all_reduce", "all_gather_object"):
        original = getattr(dist, name)

        def counted(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            counts[_name] = counts.get(_name, 0) + 1
            return _original(*args, **kwargs)

        setattr(exchange_module.dist, name, counted)
    found = []
    exchange = Exchange(None, writer=rank == 0)
    for _ in range(3):
        counts.clear()
        names = tuple(spec(f"m{index}") for index in range(100))
        exchange.start(Reading(names, torch.ones(100)), CPU).result()
        found.append(dict(counts))
    return found


def test_a_step_is_one_collective_however_many_modules(ranks: list[Any]) -> None:
    for counts in (found[2] for found in ranks):
        assert counts[0] == {"all_gather_object": 1, "all_reduce": 1}
        assert counts[1:] == [{"all_reduce": 1}] * 2


@pytest.mark.parametrize("collective", [True, False])
def test_closing_alone_waits_for_nobody(collective: bool) -> None:
    exchange = Exchange(None, writer=True)
    exchange.start(Reading((spec("a"),), torch.tensor([1.0])), CPU).result()
    in_flight = exchange.start(Reading((spec("a"), spec("z")), torch.tensor([2.0, 3.0])), CPU)
    gathered = []
    exchange.combine_anew = lambda reading, kind: gathered.append(reading) or {}  # type: ignore[method-assign,func-returns-value]  # observes the call
    in_flight.result(collective=collective)
    assert bool(gathered) is collective


def test_steps_that_read_more_have_a_layout_of_their_own() -> None:
    exchange = Exchange(None, writer=True)
    few = Reading((spec("a"),), torch.tensor([1.0]))
    many = Reading((spec("a"), spec("b"), spec("c")), torch.tensor([1.0, 2.0, 3.0]))
    for _ in range(2):
        assert len(exchange.start(many, CPU, kind="stats").result()) == 3
        in_flight = exchange.start(few, CPU)
        assert in_flight._host.numel() == 1  # of a process alone: no flag
        assert list(in_flight.result()) == [spec("a")]
