"""Restoring delayed scaling from the checkpoints of other trainers without running code that is in them.

Transformer Engine pickles a module's amax histories, scales and recipe into its `_extra_state`, and since
2.17.1 refuses to load that unless NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE=1, because loading a pickle can run
any code (`transformer_engine/pytorch/_extra_state.py`). Here each of them is read first by an unpickler that
knows nothing but what Transformer Engine puts there. What names anything else stays refused.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["is_safe", "loadable_extra_state"]

_RECIPES = "transformer_engine.common.recipe"
_ALLOWED = {
    "collections": {"OrderedDict"},
    "torch._utils": {"_rebuild_tensor_v2"},
    _RECIPES: {"DelayedScaling", "Format", "_FormatHelper", "MMParams", "QParams"},
    "megatron.core.extensions.transformer_engine": {"TEDelayedScaling"},
}
_STORAGES = {
    ("torch.storage", "_load_from_bytes"),
    ("megatron.core.safe_globals", "safe_load_from_bytes"),  # in its place since Megatron-Core 0.17
}


class _OnlyState(pickle.Unpickler):
    """Knows tensors and recipe objects."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _STORAGES:
            return _load_storage
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _load_storage(data: bytes) -> Any:
    """A tensor's storage, which torch pickles as a file of its own, by torch's restricted unpickler."""
    import torch

    return torch.load(io.BytesIO(data), weights_only=True)


def is_safe(data: bytes) -> bool:
    """Whether a pickled extra state holds nothing but tensors, numbers and a recipe object."""
    try:
        _OnlyState(io.BytesIO(data)).load()
    except Exception:  # noqa: BLE001  # a damaged pickle can raise anything, and none of it is safe
        return False
    return True


@contextmanager
def loadable_extra_state() -> Iterator[None]:
    """In the block Transformer Engine loads the extra states that are safe; the others it treats as ever."""
    from transformer_engine.pytorch.module import base

    original = getattr(base, "should_load_extra_state_pickle", None)
    if original is None:  # a release that loads every one
        yield
        return

    def should_load(data: bytes, context: str) -> bool:
        return is_safe(data) or original(data, context)

    base.should_load_extra_state_pickle = should_load
    try:
        yield
    finally:
        if base.should_load_extra_state_pickle is should_load:
            base.should_load_extra_state_pickle = original
