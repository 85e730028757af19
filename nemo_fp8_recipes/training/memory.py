"""Running out of memory, said in one sentence. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from nemo_fp8_recipes.training.errors import OutOfMemoryError

__all__ = ["memory_said"]

_ON_GPU = re.compile(r"out of memory\. Tried to allocate ([\d.]+ \w+)\.( GPU \d+)?")
_ON_CPU = re.compile(r"can't allocate memory: you tried to allocate (\d+) bytes")


@contextmanager
def memory_said() -> Iterator[None]:
    """Turn what torch and Python raise without memory into an `OutOfMemoryError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        wanted = _wanted(error)
        if wanted is None:
            raise
        raise OutOfMemoryError(
            f"Out of memory: {wanted}.",
            hint="Make micro-batches smaller (training.micro_batch_size), recompute activations "
            "(megatron.recompute_granularity), cut the model over more ranks (parallel.tp, parallel.pp), or "
            "take a smaller one (model.num_layers, model.hidden_size, model.seq_length).",
        ) from error


def _wanted(error: Exception) -> str | None:
    """What did not fit; None for an error of another kind."""
    text = str(error)
    if found := _ON_GPU.search(text):
        return f"{found[1]} more did not fit on{found[2] or ' the GPU'}"
    if found := _ON_CPU.search(text):
        return f"{int(found[1]) / 1e9:,.1f} GB more did not fit"
    if isinstance(error, MemoryError):
        return text or "an object did not fit"
    return None
