"""The state of delayed scaling, amax histories and scales, as plain tensors.

Transformer Engine keeps it in each module's `_extra_state`, a pickle that it refuses to load unless an
environment variable allows it to run code. Here the same four tensors of each module are kept by name
instead, and put back as `TransformerEngineBaseModule.set_extra_state` would. The other recipes have no state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nemo_fp8_recipes.errors import CheckpointError
from nemo_fp8_recipes.recipes import Recipe

if TYPE_CHECKING:
    import torch
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

__all__ = ["EXTRA_STATE", "collect", "restore", "without_extra_state"]

EXTRA_STATE = "_extra_state"
DIRECTIONS = ("scaling_fwd", "scaling_bwd")
TENSORS_PER_GEMM_FORWARD = 3  # input, weight, output


def _modules(model: torch.nn.Module) -> Iterator[tuple[str, TransformerEngineBaseModule]]:
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    for name, module in model.named_modules():
        if isinstance(module, TransformerEngineBaseModule):
            yield name, module


def without_extra_state(state: dict[str, Any]) -> dict[str, Any]:
    """A model's (sharded) state dict less every `_extra_state`."""
    return {key: value for key, value in state.items() if not key.endswith(EXTRA_STATE)}


def collect(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """`<module>/<direction>/{scale,amax_history}` -> fp32 tensor on the CPU; empty for recipes without state.

    Shapes: scale [3 × GEMMs] forward and [2 × GEMMs] backward, amax_history [history length, same].
    """
    state = {}
    for name, module in _modules(model):
        for direction in DIRECTIONS:
            meta = module.fp8_meta.get(direction)
            if meta is not None and hasattr(meta, "amax_history"):
                state[f"{name}/{direction}/scale"] = meta.scale.detach().cpu().clone()
                state[f"{name}/{direction}/amax_history"] = meta.amax_history.detach().cpu().clone()
    return state


def restore(model: torch.nn.Module, recipe: Recipe, state: dict[str, torch.Tensor]) -> None:
    """Put `collect`'s tensors back, before the first forward pass. Raises `CheckpointError` if they do not
    fit."""
    if not state:
        return
    te_recipe = recipe.te()
    wanted = {key.split("/")[0] for key in state}
    modules = {name: module for name, module in _modules(model) if name in wanted}
    if missing := sorted(wanted - set(modules)):
        raise CheckpointError(f"The checkpoint has scaling state of {missing[0]}, which this model lacks.")
    for name, module in modules.items():
        scale = state[f"{name}/scaling_fwd/scale"]
        module.fp8_meta["num_gemms"] = scale.numel() // TENSORS_PER_GEMM_FORWARD
        module.fp8_meta["recipe"] = te_recipe
        module.init_fp8_meta_tensors(te_recipe)
        for direction in DIRECTIONS:
            meta = module.fp8_meta[direction]
            for tensor in ("scale", "amax_history"):
                saved, current = state[f"{name}/{direction}/{tensor}"], getattr(meta, tensor)
                if saved.shape != current.shape:
                    raise CheckpointError(
                        f"{name} has {tensor} of shape {tuple(current.shape)}, the checkpoint "
                        f"{tuple(saved.shape)}."
                    )
                current.copy_(saved)
