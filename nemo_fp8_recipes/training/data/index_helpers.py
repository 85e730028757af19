"""Megatron's compiled helpers for building indices, in numpy, for an installation that lacks them.

`megatron/core/datasets/helpers.cpp` comes compiled in the wheel; a source install compiles it with make and a
C++ compiler, which not every machine has. The functions here give the same indices, more slowly for blends.
"""

from __future__ import annotations

import importlib
import math
import sys
from types import ModuleType
from typing import Any

import numpy as np

__all__ = ["provide"]

Array = np.ndarray[Any, Any]
_COMPILED = "megatron.core.datasets.helpers_cpp"


def provide() -> bool:
    """See to it that Megatron finds its helpers; whether they are the ones here, since none are compiled."""
    try:
        return importlib.import_module(_COMPILED).__name__ == __name__
    except ImportError:
        sys.modules[_COMPILED] = _as_module()
        return True


def _as_module() -> ModuleType:
    module = ModuleType(__name__, __doc__)
    for function in (
        build_sample_idx_int32,
        build_sample_idx_int64,
        build_blending_indices,
        build_exhaustive_blending_indices,
    ):
        setattr(module, function.__name__, function)
    return module


def build_sample_idx_int64(
    sizes: Array,
    document_idx: Array,
    seq_length: int,
    num_epochs: int,
    tokens_per_epoch: int,
    drop_last_partial_sequence: bool = True,
    add_extra_token_to_sequence: int = 1,
) -> Array:
    """As in helpers.cpp, where each sample begins: int64 [samples + 1, 2].

    A row holds an index into `document_idx` and the token offset in that document. Samples are `seq_length`
    tokens apart and take `add_extra_token_to_sequence` tokens more.
    """
    extra = add_extra_token_to_sequence
    total = num_epochs * tokens_per_epoch - extra
    if drop_last_partial_sequence:
        samples = total // seq_length
    else:
        samples = math.ceil(np.float32(total) / np.float32(seq_length))
    lengths = sizes[document_idx].astype(np.int64)
    ends = np.cumsum(lengths)
    # A sample begins in the document that holds the last token of the one before it.
    last = np.arange(1, samples + 1, dtype=np.int64) * seq_length + extra - 1
    documents = np.searchsorted(ends, last, side="right")
    beyond = documents >= len(lengths)
    documents = np.minimum(documents, len(lengths) - 1)
    offsets = last - (ends[documents] - lengths[documents]) + 1 - extra
    offsets[beyond] = lengths[-1] - extra
    index = np.zeros((samples + 1, 2), dtype=np.int64)
    index[1:, 0], index[1:, 1] = documents, offsets
    return index


def build_sample_idx_int32(*arguments: Any, **named: Any) -> Array:
    """As in helpers.cpp, with the arguments of `build_sample_idx_int64`: int32 [samples + 1, 2]."""
    return build_sample_idx_int64(*arguments, **named).astype(np.int32)


def build_blending_indices(
    dataset_index: Array,
    dataset_sample_index: Array,
    weights: Any,
    num_datasets: int,
    size: int,
    verbose: bool,
) -> None:
    """Fill both arrays, [size]: which dataset each sample is from, and its number there. Each sample is taken
    from the dataset that is furthest behind its weight."""
    del verbose
    shares = [float(weights[number]) for number in range(num_datasets)]
    taken = [0] * num_datasets
    for sample in range(size):
        position = max(float(sample), 1.0)
        errors = [share * position - count for share, count in zip(shares, taken, strict=True)]
        chosen = errors.index(max(errors))
        dataset_index[sample] = chosen
        dataset_sample_index[sample] = taken[chosen]
        taken[chosen] += 1


def build_exhaustive_blending_indices(
    dataset_index: Array, dataset_sample_index: Array, sizes: Any, num_datasets: int
) -> None:
    """The same with exactly `sizes[i]` samples of dataset i, evenly mixed."""
    counts = [int(sizes[number]) for number in range(num_datasets)]
    total = float(sum(counts))
    taken = [0] * num_datasets
    left = list(range(num_datasets))
    sample = 0
    while left:
        position = max(float(sample), 1.0)
        chosen = max(left, key=lambda one: counts[one] / total * position - taken[one])
        dataset_index[sample] = chosen
        dataset_sample_index[sample] = taken[chosen]
        taken[chosen] += 1
        if taken[chosen] == counts[chosen]:
            left.remove(chosen)
        sample += 1
