"""The state of delayed scaling in a NeMo checkpoint, read without running what is in it.

Megatron saves each module's `_extra_state`, which for delayed scaling is a pickle of Transformer Engine's.
Transformer Engine since 2.17.1 refuses to load it unless an environment variable allows it to run code, so
that NeMo cannot resume a run with delayed scaling. Here the four tensors are taken out of the pickle by an
unpickler that knows nothing but tensors and plain values, and put back into the modules."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nemo_fp8_recipes.errors import CheckpointError
from nemo_fp8_recipes.injection.module_names import unwrap
from nemo_fp8_recipes.recipes import Recipe
from nemo_fp8_recipes.training.checkpoint import fp8_state

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["put_back", "read_extra_state", "take_out"]

_TENSORS = {
    "scale_fwd": "scaling_fwd/scale",
    "amax_history_fwd": "scaling_fwd/amax_history",
    "scale_bwd": "scaling_bwd/scale",
    "amax_history_bwd": "scaling_bwd/amax_history",
}
"""Transformer Engine's keys -> ours, `TransformerEngineBaseModule.get_extra_state` and `fp8_state`."""


_PASSED_OVER = ("transformer_engine.", "megatron.core.extensions.")
"""Where the classes of recipe objects live."""


class _Opaque:
    """Stands for an object that is of no use here: a recipe, an enum. Takes whatever state it is given."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> _Opaque:
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    """Tensors are rebuilt by torch's restricted loader; the recipe object is passed over; nothing else is
    known."""

    def find_class(self, module: str, name: str) -> Any:
        import torch
        from torch import _utils

        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _utils._rebuild_tensor_v2
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _storage
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.startswith(_PASSED_OVER):
            return _Opaque
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no amax history needs")


def _storage(data: bytes) -> Any:
    """What `torch.storage._load_from_bytes` does, without its unrestricted unpickler."""
    import torch

    return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")


def read_extra_state(value: Any) -> dict[str, torch.Tensor]:
    """The tensors in a module's `_extra_state`, by Transformer Engine's keys; empty where it holds none.

    Args:
        value: what the checkpoint holds: a uint8 tensor, a BytesIO as older releases wrote it, or None.

    Raises:
        CheckpointError: it is not what Transformer Engine writes.
    """
    import torch

    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().numpy().tobytes()
    elif isinstance(value, io.BytesIO):
        data = value.getvalue()
    else:
        return {}
    if not data:
        return {}
    try:
        state = _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"The delayed-scaling state in the checkpoint is not what Transformer Engine writes: {error}."
        ) from error
    found = state if isinstance(state, Mapping) else {}
    return {key: found[key] for key in _TENSORS if isinstance(found.get(key), torch.Tensor)}


def take_out(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Remove the pickles from a model's loaded state dict and give back what they held.

    The `_extra_state` entries stay, empty, as those of a module that was never quantised: strict loading
    finds every key.

    Returns:
        `<module path as in the state dict>` -> tensors by Transformer Engine's keys.
    """
    import torch

    taken = {}
    for key in [key for key in state_dict if key.endswith(fp8_state.EXTRA_STATE)]:
        tensors = read_extra_state(state_dict[key])
        if tensors:
            taken[key.removesuffix(fp8_state.EXTRA_STATE).rstrip(".")] = tensors
            state_dict[key] = torch.empty(0, dtype=torch.uint8)
    return taken


def tensors_of(taken: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What `take_out` gave, named as `fp8_state.restore` takes it, module paths without wrappers."""
    return {
        f"{bare(path)}/{_TENSORS[key]}": tensor
        for path, tensors in taken.items()
        for key, tensor in tensors.items()
    }


def put_back(chunk: nn.Module, recipe: Recipe, taken: Mapping[str, Any]) -> None:
    """Restore the histories and scales of a chunk of the model, before its first forward pass."""
    fp8_state.restore(unwrap(chunk), recipe, tensors_of(taken))


def bare(path: str) -> str:
    """A module's path without the `module.` of wrappers at its beginning."""
    while path.startswith("module."):
        path = path.removeprefix("module.")
    return path
