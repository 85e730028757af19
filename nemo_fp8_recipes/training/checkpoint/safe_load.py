"""Loading a checkpoint without running code that is in it.

Megatron's torch_dist format has three places where Python's pickle comes in:

- `common.pt`: torch.load, restricted by default;
- objects inside `*.distcp`: torch.distributed.checkpoint asks for the unrestricted unpickler. torch's own
  switch `TORCH_FORCE_WEIGHTS_ONLY_LOAD` overrules it for the duration of the load;
- `.metadata`: plain pickle, with no switch. It is read here first by an unpickler that knows only the classes
  such a file consists of, and refused when it names another."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_fp8_recipes.errors import CheckpointError

__all__ = ["check_metadata", "weights_only"]

FORCE_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
FORCE_UNRESTRICTED = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"

# Module prefix -> class names that a `.metadata` file holds.
_METADATA_MODULES = frozenset(
    {"torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"}
)
_METADATA_NAMES = frozenset(
    {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.planner", "SavePlan"),
        ("torch.distributed.checkpoint.planner", "WriteItem"),
        ("torch.distributed.checkpoint.planner", "WriteItemType"),
        ("torch.distributed.checkpoint.planner", "TensorWriteData"),
        ("torch.distributed.checkpoint.planner", "BytesIOWriteData"),
        ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
        ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
    }
)


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in _METADATA_MODULES or (module, name) in _METADATA_NAMES or _is_torch_dtype(module, name):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint's metadata needs")


def _is_torch_dtype(module: str, name: str) -> bool:
    import torch

    return module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)


def check_metadata(directory: Path) -> None:
    """Raise `CheckpointError` unless `.metadata` holds nothing but what describes a checkpoint."""
    file = directory / ".metadata"
    try:
        with file.open("rb") as stream:
            _MetadataUnpickler(stream).load()
    except (
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        ImportError,
        IndexError,
        OSError,
        ValueError,
    ) as error:
        raise CheckpointError(
            f"The checkpoint {directory} is not safe to load: "
            f".metadata is not what Megatron writes ({error}).",
            value=str(directory),
        ) from error


@contextmanager
def weights_only() -> Iterator[None]:
    """Force torch's restricted unpickler for every torch.load in the block, whatever the caller asks for."""
    if os.environ.get(FORCE_UNRESTRICTED, "0") not in ("", "0"):
        raise CheckpointError(
            f"{FORCE_UNRESTRICTED} is set, which lets checkpoints run code.",
            hint=f"Unset {FORCE_UNRESTRICTED} to resume.",
        )
    before = os.environ.get(FORCE_WEIGHTS_ONLY)
    os.environ[FORCE_WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[FORCE_WEIGHTS_ONLY]
        else:
            os.environ[FORCE_WEIGHTS_ONLY] = before
