"""What a module of a Megatron model is called, on every pipeline stage and under every wrapper.

Names are paths relative to the GPT (or Mamba) model itself: the wrappers around it (DDP, Float16Module,
FSDP) are stripped. A layer carries its number in the whole model, not its index on this pipeline stage, and
an expert that in its layer, not its index on this expert-parallel rank, so that
`decoder.layers.17.mlp.linear_fc1` is the same layer in a manifest of one GPU and of a hundred.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["NamedModule", "model_chunks", "named_modules", "unwrap"]


@dataclass(frozen=True)
class NamedModule:
    """A module, its path in the whole model, and the transformer layer it belongs to.

    Attributes:
        path: dotted path, e.g. "decoder.layers.17.mlp.linear_fc1"; "" is the model itself.
        module: the torch module; Any, because what it is is only known by looking.
        layer: 0-based layer index in the whole model, None outside the layers.
    """

    path: str
    module: Any
    layer: int | None


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP, Float16Module and the like, which all keep it in `.module`."""
    from torch import nn

    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return model


def model_chunks(model: nn.Module | Sequence[nn.Module]) -> tuple[nn.Module, ...]:
    """The unwrapped chunks of a model: one, or several under a virtual pipeline (Megatron's list of
    chunks).
    """
    from torch import nn

    chunks = (model,) if isinstance(model, nn.Module) else tuple(model)
    return tuple(unwrap(chunk) for chunk in chunks)


def named_modules(model: nn.Module | Sequence[nn.Module]) -> Iterator[NamedModule]:
    """Every module of every chunk, parents first, each once."""
    seen: set[int] = set()
    for chunk in model_chunks(model):
        yield from _walk(NamedModule("", chunk, None), seen)


def _walk(here: NamedModule, seen: set[int]) -> Iterator[NamedModule]:
    if id(here.module) in seen:
        return
    seen.add(id(here.module))
    yield here
    for name, child in here.module.named_children():
        layer = here.layer
        number = getattr(child, "layer_number", None)
        # Megatron numbers layers from 1 and adds the offset of the pipeline stage; the list index is local.
        if name.isdigit() and isinstance(number, int):
            layer = number - 1
            name = str(layer)
        elif name.isdigit() and here.path.endswith(".local_experts"):
            name = str(_first_expert(len(here.module)) + int(name))
        yield from _walk(NamedModule(f"{here.path}.{name}" if here.path else name, child, layer), seen)


def _first_expert(local: int) -> int:
    """The number of this rank's first expert, where each expert-parallel rank has `local` of a layer's."""
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return 0
    return int(parallel_state.get_expert_model_parallel_rank()) * local
