"""The kernel that reads windows of amax histories, against the torch operations."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nemo_fp8_recipes.emulation.kernels import Library
from nemo_fp8_recipes.telemetry.probes.delayed import history_windows, stacked_rows


@pytest.mark.parametrize("length", [1, 2, 3, 1024])
def test_windows_are_those_of_the_torch_operations(native: Library, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    histories = [torch.rand(length, width, generator=generator) for width in (3, 2, 6, 1)]
    oldest, last = (torch.rand(12, generator=generator) for _ in range(2))
    last[torch.tensor([1, 4, 11])] = 0.0  # these did not roll
    last[2], last[3], oldest[5] = torch.nan, torch.inf, torch.inf
    slots = torch.tensor([0, 1, 2, 3, 4, 5, 9, 11, 10])
    found = native.history_windows(histories, oldest, last, slots)
    assert found is not None
    wanted = history_windows(histories, oldest, last, slots)
    assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))
    assert found.shape == (len(slots) * length,)


def test_rows_are_stacked_like_those_of_the_torch_operations(native: Library) -> None:
    histories = [torch.rand(4, width) for width in (3, 2, 6, 1)]
    for row in (0, 1, 3):
        found = native.stacked_rows(histories, row)
        assert found is not None
        assert torch.equal(found, torch.cat([one[row] for one in histories]))
    vectors = [torch.rand(3), torch.rand(5)]
    found = native.stacked_rows(vectors, 0)
    assert found is not None
    assert torch.equal(found, torch.cat(vectors))


def test_histories_that_do_not_lie_in_one_piece_are_left_to_torch(native: Library) -> None:
    history, numbers = torch.rand(2, 4).t(), torch.rand(2)
    assert native.history_windows([history], numbers, numbers, torch.tensor([0])) is None
    assert native.stacked_rows([history], 0) is None


def test_histories_of_different_lengths_are_left_to_torch(native: Library) -> None:
    """Which says what is wrong with them; the kernel would go on behind the shorter one."""
    short, long = torch.rand(2, 3), torch.rand(16, 3)
    nothing, slots = torch.zeros(6), torch.arange(6)
    assert native.history_windows([long, short], nothing, nothing, slots) is None
    assert native.history_windows([short, long], nothing, nothing, slots) is None
    assert native.stacked_rows([long, short], 5) is None
    assert native.stacked_rows([long, torch.rand(3)], 1) is None
    assert native.stacked_rows([short], 2) is None
    for call in (
        lambda: history_windows([long, short], nothing, nothing, slots),
        lambda: stacked_rows([long, short], 5),
    ):
        with pytest.raises((RuntimeError, IndexError), match=r"size|index|range"):
            call()


def test_tensors_without_memory_are_left_to_torch(native: Library) -> None:
    with FakeTensorMode():
        history, numbers = torch.zeros(4, 2), torch.zeros(2)
        assert native.history_windows([history], numbers, numbers, torch.tensor([0])) is None
