"""A model that does not fit ends in one sentence, whoever noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemo_fp8_recipes.errors import Fp8Error
from nemo_fp8_recipes.training.memory import memory_said
from tests.training.command import train

# As torch 2.13's CUDA caching allocator words it.
ON_GPU = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 3 has a total capacity of 79.11 GiB of which 4.00 "
    "MiB is free. Including non-PyTorch memory, this process has 79.10 GiB memory in use."
)


def test_the_gpus_own_words_are_understood() -> None:
    with (
        pytest.raises(Fp8Error, match=r"Out of memory: 20\.00 MiB more did not fit on GPU 3\."),
        memory_said(),
    ):
        raise torch.OutOfMemoryError(ON_GPU)


def test_what_the_cpus_allocator_raises_is_understood() -> None:
    with pytest.raises(Fp8Error, match=r"Out of memory: 4,000,000\.0 GB more did not fit"), memory_said():
        torch.empty(10**15, dtype=torch.float32)


def test_what_python_raises_is_understood() -> None:
    with pytest.raises(Fp8Error, match="Out of memory: an object did not fit"), memory_said():
        bytearray(2**62)


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory_said():
        raise RuntimeError("shapes")


def test_a_job_that_does_not_fit_ends_in_one_line(tmp_path: Path) -> None:
    failed = train(tmp_path / "run", "fp8_recipe=bf16", "model.vocab_size=1000000000000", status=2)
    lines = [line for line in failed.errors.splitlines() if line.startswith("nemo-fp8: ")]
    assert len(lines) == 1, failed.errors
    assert "did not fit" in lines[0]
    assert "Traceback" not in failed.errors
    assert not failed.path.exists()
