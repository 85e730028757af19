"""Which modules of a built model run as CUDA graphs, by whose capture.

A replayed graph runs kernels and no Python, so nothing that stands around Transformer Engine's functions
sees what it quantises. Whether a module is one of them is read from what each way of capturing leaves on the
model:

    local               Megatron's `cudagraph_manager` on the layer, which runs it in place of `forward`
                        (`megatron/core/transformer/cuda_graphs.py`, `CudaGraphManager`)
    transformer_engine  Megatron's list `cuda_graphs` on the layer, filled when the graphs are there
                        (`megatron/core/transformer/module.py`, `GraphableMegatronModule`)
    full_iteration      Megatron's `cuda_graph_scope`: forward and backward of the whole model are one graph
                        (`megatron/core/full_cuda_graph.py`)
    graphed_callable    `make_graphed_callables` of Transformer Engine or torch put a function of its own in
                        the place of the module's `forward` (`transformer_engine/pytorch/graph.py`)

The first three say so from the moment the model is built; the capture follows after some steps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from nemo_fp8_recipes.injection.module_names import model_chunks
from nemo_fp8_recipes.injection.peers import derives_from

if TYPE_CHECKING:
    from torch import nn

__all__ = ["CAPTURED_BY", "capture_flags", "graphed_modules"]

CAPTURED_BY = {
    "local": "a CUDA graph of Megatron (cuda_graph_impl=local)",
    "transformer_engine": "a CUDA graph of Transformer Engine (cuda_graph_impl=transformer_engine)",
    "full_iteration": "a CUDA graph of the whole iteration (cuda_graph_scope=full_iteration)",
    "graphed_callable": "a CUDA graph (make_graphed_callables)",
}
"""Who captures a module, and how a sentence says it. The keys are part of the manifest's schema."""

_GRAPHED_FORWARD = ("transformer_engine.pytorch.graph", "torch.cuda.graphs")
"""Modules whose functions take the place of a captured module's `forward`."""

_FLAGS = (
    ("transformer_engine.pytorch.graph", "is_graph_capturing"),
    ("megatron.core.transformer.cuda_graphs", "is_graph_capturing"),
    ("megatron.core.transformer.cuda_graphs", "is_graph_warmup"),
)


def graphed_modules(model: nn.Module | Sequence[nn.Module]) -> dict[int, str]:
    """id of every module that runs, or is going to run, inside a CUDA graph -> who captures it, a key of
    `CAPTURED_BY`.

    Args:
        model: a model, wrapped or not, or Megatron's list of virtual-pipeline chunks.
    """
    found: dict[int, str] = {}
    for chunk in model_chunks(model):
        for by, root in _roots(chunk):
            for module in root.modules():
                found.setdefault(id(module), by)
    return found


def capture_flags() -> tuple[Callable[[], bool], ...]:
    """Functions of the loaded packages that say whether a capture is under way in this process: from its
    warm-up passes, which run eagerly on made-up data, to its end.
    """
    found = (getattr(sys.modules.get(module), name, None) for module, name in _FLAGS)
    return tuple(flag for flag in found if flag is not None)


def _roots(chunk: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that are captured as a whole, and by whom."""
    config = getattr(chunk, "config", None)
    if "full_iteration" in _scope(config) and getattr(config, "cuda_graph_impl", "local") != "none":
        yield "full_iteration", chunk
    for module in chunk.modules():
        yield from ((by, part) for by, part in _of_megatron(module) if part is not None)
        forward = vars(module).get("forward")
        if getattr(forward, "__module__", None) in _GRAPHED_FORWARD:
            yield "graphed_callable", module


def _of_megatron(module: Any) -> Iterator[tuple[str, nn.Module | None]]:
    """What Megatron captures of `module`, if this is a layer; the block of layers has the same attributes for
    inference.
    """
    if not hasattr(module, "layer_number"):
        return
    if hasattr(module, "cudagraph_manager"):
        yield "local", module
        return
    parts = hasattr(module, "cudagraph_manager_router")
    if not parts and not isinstance(getattr(module, "cuda_graphs", None), list):
        return
    scope = _scope(getattr(module, "config", None))
    if derives_from(module, "megatron", "MambaLayer") and scope and "mamba" not in scope:
        return
    # The scope may leave parts of the layer outside. Before Megatron-Core 0.14 there was no such choice.
    covered = getattr(module, "_get_submodules_under_cudagraphs", lambda: [module])
    yield from (("local" if parts else "transformer_engine", part) for part in covered())


def _scope(config: Any) -> set[str]:
    """Megatron's `cuda_graph_scope`, enumerators or strings, as names; empty: whole layers."""
    scope = getattr(config, "cuda_graph_scope", None) or ()
    parts = (scope,) if isinstance(scope, str) else scope
    return {getattr(part, "name", part) for part in parts} - {"full"}
