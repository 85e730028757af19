"""The kernels on any number of threads, in threads at once, and in forked processes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nemo_fp8_recipes.emulation.kernels import Library, build, compiled
from tests.emulation.kernels.everything import everything
from tests.numerics.inputs import mixed
from tests.support.processes import run_python

SHAPE = (1056, 544)


@pytest.fixture(autouse=True)
def _number_of_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["torch's threads", "threads of their own"])
def threaded(request: pytest.FixtureRequest, native: Library) -> Iterator[Library]:
    team = compiled._torch_team()
    if team is None:
        pytest.skip("torch has no OpenMP runtime here")
    loaded = build.load()
    yield Library(loaded, team if request.param == "torch's threads" else None)
    Library(loaded, team)


def test_any_number_of_threads_gives_the_same_bits(threaded: Library) -> None:
    x = mixed(SHAPE, torch.float32)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(everything(threaded, x))
    assert found[0] == found[1] == found[2]


def test_calls_from_several_threads_do_not_disturb_each_other(threaded: Library) -> None:
    torch.set_num_threads(2)
    inputs = [mixed(SHAPE, torch.float32, seed) for seed in range(4)]
    expected = [everything(threaded, x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert list(pool.map(lambda x: everything(threaded, x), inputs)) == expected


def test_they_use_the_threads_of_torchs_own_runtime(native: Library) -> None:
    if not torch.backends.openmp.is_available():
        pytest.skip("torch has no OpenMP runtime here")
    assert native._has_team() == 1
    assert (
        compiled._torch_team()
        == ctypes.cast(
            ctypes.CDLL(f"{torch.__path__[0]}/lib/libtorch_cpu.so")["GOMP_parallel"], ctypes.c_void_p
        ).value
    )


@pytest.mark.usefixtures("native")
def test_forked_processes_neither_wait_for_their_parents_threads_nor_disturb_each_other() -> None:
    """With the number of threads that torch had in the parent, which had used them."""
    run_python(
        """
        import os
        import torch
        from nemo_fp8_recipes.emulation.kernels import library
        from tests.emulation.kernels.everything import everything
        from tests.numerics.inputs import mixed

        torch.set_num_threads(3)
        kernels = library()
        inputs = [mixed((1056, 544), torch.float32, seed) for seed in range(3)]
        expected = [everything(kernels, x) for x in inputs]
        had_team = kernels._has_team()

        def same(number):
            return everything(kernels, inputs[number]) == expected[number]

        children = []
        for number in range(3):
            child = os.fork()
            if child == 0:
                os._exit(0 if same(number) and not kernels._has_team() else 1)
            children.append(child)
        here = all(same(number) for number in range(3))
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
        assert here and kernels._has_team() == had_team
        """,
        timeout=120,
    )
