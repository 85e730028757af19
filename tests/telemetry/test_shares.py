"""Which part of an optimizer's copy is on which rank, and what is read of it: on stand-ins for Megatron's."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nemo_fp8_recipes.telemetry.shares import Share, shares
from nemo_fp8_recipes.telemetry.weights import MainCopies

_Te = type("QuantizedTensorStorage", (), {"__module__": "transformer_engine.stand_in"})
Wrapper = type("DistributedDataParallel", (torch.nn.Module,), {"__module__": "megatron.stand_in"})


class Weight(_Te):  # type: ignore[misc, valid-type]  # Transformer Engine's is known by its name
    """What is read of a quantised parameter."""

    def __init__(self, *shape: int) -> None:
        self.shape = torch.Size(shape)
        self.dtype = torch.bfloat16
        self.device = torch.device("cpu")
        self.main_param: Any = None

    def numel(self) -> int:
        return self.shape.numel()


class Group:
    """A process group as the buffer has it, seen from one of its ranks."""

    def __init__(self, rank: int, ranks: int, lowest: int = 0) -> None:
        self._rank, self._ranks, self.lowest = rank, ranks, lowest

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._ranks


class Bucket:
    def __init__(self, offset: int, size: int) -> None:
        self.offset = offset
        self.grad_data = torch.empty(size, device="meta")


class Buffer:
    """Parameters one behind the other, in buckets that are padded to a multiple of the ranks."""

    def __init__(self, buckets: list[list[Any]], group: Group, padding: int = 0) -> None:
        self.data_parallel_group = group
        self.buckets: list[Bucket] = []
        self.param_index_map: dict[Any, tuple[int, int, int]] = {}
        offset = 0
        for index, those in enumerate(buckets):
            place = offset
            for parameter in those:
                self.param_index_map[parameter] = (place, place + parameter.numel(), index)
                place += parameter.numel() + padding
            size = -(-(place - offset) // group.size()) * group.size()
            self.buckets.append(Bucket(offset, size))
            offset += size


def wrapped(*buffers: Any, experts: tuple[Any, ...] = ()) -> Any:
    wrapper = Wrapper()
    wrapper.buffers, wrapper.expert_parallel_buffers = list(buffers), list(experts)
    return wrapper


@pytest.fixture(autouse=True)
def groups_say_their_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        dist,
        "get_process_group_ranks",
        lambda group: list(range(group.lowest, group.lowest + group.size())),
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(1, 500), min_size=1, max_size=5), min_size=1, max_size=3),
    ranks=st.integers(1, 7),
    padding=st.integers(0, 80),
)
@example(sizes=[[7]], ranks=7, padding=0)
@example(sizes=[[1, 1, 300]], ranks=2, padding=0)
def test_every_element_is_on_one_rank(sizes: list[list[int]], ranks: int, padding: int) -> None:
    buckets = [[Weight(size, 1) for size in those] for those in sizes]
    found: dict[Any, list[Share]] = {}
    for rank in range(ranks):
        buffer = Buffer(buckets, Group(rank, ranks, lowest=10), padding)
        for parameter, share in shares(wrapped(buffer)):
            found.setdefault(parameter, []).append(share)
    for weight in (one for those in buckets for one in those):
        pieces = found[weight]  # in the order of the ranks
        assert (pieces[0].first, pieces[-1].last) == (0, weight.numel())
        assert all(before.last == after.first for before, after in pairwise(pieces))
        assert all(piece.first < piece.last for piece in pieces)
        assert {piece.group for piece in pieces} == {10}


def test_experts_are_shared_by_other_ranks() -> None:
    dense, expert = Weight(8, 8), Weight(4, 8)
    model = wrapped(Buffer([[dense]], Group(3, 4)), experts=(Buffer([[expert]], Group(1, 2, lowest=1)),))
    assert dict(shares([torch.nn.Sequential(model)])) == {dense: Share(48, 64, 0), expert: Share(16, 32, 1)}


def test_a_model_without_such_buffers_has_no_shares() -> None:
    assert not list(shares(torch.nn.Linear(2, 2)))
    assert not list(shares(wrapped(object())))


def copies(weight: Weight, rank: int = 1) -> MainCopies:
    return MainCopies(wrapped(Buffer([[weight]], Group(rank, 2))))


def test_a_part_is_read_where_it_belongs() -> None:
    weight = Weight(3, 10)
    weight.main_param = torch.arange(15.0).view(3, 5) + 1 / 1024
    weight.main_param_sharded = True
    copy = copies(weight).of(weight)
    assert copy is not None
    assert (copy.first, copy.group) == (15, 0)
    # The optimizer casts through the parameter's own dtype.
    assert copy.values.dtype == torch.bfloat16
    assert copy.values.tolist() == (torch.arange(15.0) + 1 / 1024).bfloat16().tolist()


def test_a_whole_copy_needs_no_shares() -> None:
    weight = Weight(3, 10)
    weight.main_param = torch.ones(3, 10)
    copy = MainCopies(torch.nn.Linear(2, 2)).of(weight)
    assert copy is not None
    assert (copy.first, copy.group, copy.values.dtype) == (0, None, torch.float32)
    assert not copy.sharded
    weight.main_param_sharded = True
    copy = MainCopies(torch.nn.Linear(2, 2)).of(weight)
    assert copy is not None
    assert copy.sharded
    assert copy.values.dtype == torch.bfloat16


def released() -> torch.Tensor:
    """A copy that the optimizer keeps elsewhere between its steps, its storage given away."""
    values = torch.ones(15)
    values.untyped_storage().resize_(0)
    return values


@pytest.mark.parametrize(
    "main_param",
    [
        pytest.param(None, id="nothing here"),
        pytest.param(torch.ones(14), id="another length"),
        pytest.param(torch.ones(0), id="empty"),
        pytest.param(torch.ones(15, device="meta"), id="elsewhere"),
        pytest.param(released(), id="released"),
    ],
)
def test_what_cannot_be_placed_is_not_read(main_param: Any) -> None:
    weight = Weight(3, 10)
    weight.main_param = main_param
    assert copies(weight).of(weight) is None


def test_a_part_without_the_wrapper_is_not_read() -> None:
    weight = Weight(3, 10)
    weight.main_param = torch.ones(15)
    assert MainCopies(torch.nn.Linear(2, 2)).of(weight) is None
