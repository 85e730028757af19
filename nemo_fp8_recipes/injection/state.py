"""Transformer Engine's quantisation state: is a context open, and starting it afresh.

Two facts of Transformer Engine make this necessary. A module that leaves delayed scaling and comes back
makes new histories and scales, but never registers them for the update (`add_fp8_tensors_to_global_buffer`
returns early when the module already has an entry), so that its scale stays 1.0 without a word. And a module
keeps its quantizers when the options of a recipe change but not its kind (`set_meta_tensor` compares the
class only).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nemo_fp8_recipes.errors import InjectionError
from nemo_fp8_recipes.injection.module_names import NamedModule, named_modules
from nemo_fp8_recipes.injection.operations import forget_quantizers, keeps_weight_quantized, recipe_states
from nemo_fp8_recipes.injection.peers import derives_from

if TYPE_CHECKING:
    from torch import nn

__all__ = ["frozen_delayed_modules", "inside_autocast", "reset_quantization_state"]

_MODULE_STATE = ("scaling_fwd", "scaling_bwd", "recipe", "global_fp8_buffer_pos_fwd_recompute")


def inside_autocast() -> bool:
    """Whether a Transformer Engine FP8 context is open in this process."""
    return bool(_manager().is_fp8_enabled())


def frozen_delayed_modules(model: nn.Module | Sequence[nn.Module]) -> tuple[str, ...]:
    """Paths of modules quantised by delayed scaling whose histories Transformer Engine never updates."""
    registered = {
        id(history) for histories in _global().global_amax_history_buffer.values() for history in histories
    }
    return tuple(
        named.path
        for named in _te_modules(model)
        if named.module.fp8
        and any(
            getattr(state, "amax_history", None) is not None and id(state.amax_history) not in registered
            for state in (named.module.fp8_meta.get("scaling_fwd"), named.module.fp8_meta.get("scaling_bwd"))
        )
    )


def reset_quantization_state(model: nn.Module | Sequence[nn.Module]) -> None:
    """Forget every quantizer, history and scale of a model, so that the next forward pass makes them anew.

    Call it between steps when another recipe, or the same recipe with other options, takes over: otherwise a
    return to delayed scaling is frozen and changed options of the same recipe have no effect. Delayed
    scaling starts with empty histories and scale 1.0. Parameters, gradients and optimizer state are left
    alone.

    Args:
        model: every chunk of the model that this process trains.

    Raises:
        InjectionError: a Transformer Engine context is open; a parameter is stored quantised, in which case
            its recipe is fixed when the model is built; or modules outside `model` share the delayed-scaling
            buffers, which are reset as a whole.
    """
    if inside_autocast():
        raise InjectionError(
            "The quantisation state cannot be reset inside a Transformer Engine FP8 context."
        )
    modules = tuple(_te_modules(model))
    everything = tuple(named_modules(model))
    quantized = [named.path for named in modules if named.module.primary_weights_in_fp8]
    quantized += [named.path for named in everything if keeps_weight_quantized(named.module)]
    if quantized:
        raise InjectionError(
            f"The recipe of {quantized[0]} cannot change: its primary weight is stored quantised.",
            key="fp8_param",
            value=True,
            allowed=[False],
        )
    state = _global()
    metas = [named.module.fp8_meta for named in modules]
    metas += [meta for named in everything for meta in recipe_states(named.module)]
    ours = {entry for meta in metas for entry in _buffer_entries(meta)}
    for key, histories in state.global_amax_history_buffer.items():
        if any((key, position) not in ours for position in range(len(histories))):
            raise InjectionError(
                "Other modules of this process use delayed scaling too, and Transformer Engine keeps one set "
                "of buffers for all.",
                hint="Pass every chunk of the model, as the list that Megatron's get_model returns.",
            )
    for named in modules:
        _reset_module(named.module)
    for named in everything:
        forget_quantizers(named.module)
    for buffer in (
        "global_amax_buffer",
        "global_amax_history_buffer",
        "global_scale_buffer",
        "autocast_arguments",
    ):
        getattr(state, buffer).clear()


def _reset_module(module: Any) -> None:
    for key in (*_MODULE_STATE, _manager().get_buffer_info()):
        module.fp8_meta.pop(key, None)
    module.fp8_meta["fp8_checkpoint"] = False  # a checkpoint saved now has no quantisation state to hold
    module.fp8 = False
    module.quantizers = {"scaling_fwd": [], "scaling_bwd": []}
    module.fp8_initialized = False
    module.fp8_meta_tensors_initialized = False
    module._fp8_workspaces.clear()  # weights quantised and cached for the micro-batches of a step


def _buffer_entries(meta: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The entries of the global buffers that a module's `fp8_meta` names, as (key, position); kept flat the
    other way.
    """
    flat = meta.get(_manager().get_buffer_info(), [])
    yield from zip(flat[1::2], flat[0::2], strict=True)


def _te_modules(model: nn.Module | Sequence[nn.Module]) -> Iterator[NamedModule]:
    for named in named_modules(model):
        if derives_from(named.module, "transformer_engine", "TransformerEngineBaseModule"):
            yield named


def _manager() -> Any:
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    return FP8GlobalStateManager


def _global() -> Any:
    """Where the global buffers live: on an instance since Transformer Engine 2.15, on the class before."""
    manager = _manager()
    return getattr(manager, "quantization_state", manager)
