"""Linear layers that run as operations of Transformer Engine, and not as the modules that hold their weights.

With `use_transformer_engine_op_fuser` Megatron makes its MLP of a `TEFusedMLP`: linear_fc1 and linear_fc2 are
there for their parameters and names alone. What runs are operations (`transformer_engine.pytorch.ops`), made
of them in the first forward pass and kept outside the module tree
(`megatron/core/extensions/transformer_engine.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from nemo_fp8_recipes.injection.module_names import NamedModule
from nemo_fp8_recipes.injection.peers import derives_from

__all__ = ["FusedLinear", "forget_operations", "fused_linears", "is_fused_mlp", "recipe_states"]

_LINEARS = ("linear_fc1", "linear_fc2")


class FusedLinear:
    """A linear module with the quantisation state of the operation that runs in its place.

    Reads like the module. An operation keeps no output and no grad_input quantizer: their places, which a
    module has, hold None.
    """

    def __init__(self, mlp: Any, module: Any) -> None:
        self._mlp = mlp
        self.module = module

    @property
    def operation(self) -> Any | None:
        """The operation that multiplies with this module's weight; None before the first forward pass."""
        for operation in _operations(self._mlp):
            if getattr(operation, "weight", None) is self.module.weight and derives_from(
                operation, "transformer_engine", "BasicLinear"
            ):
                return operation
        return None

    @property
    def forwarded_at_least_once(self) -> bool:
        return self.operation is not None

    @property
    def quantizers(self) -> dict[str, list[Any]]:
        kept = getattr(self.operation, "_quantizers", None)
        if kept is None:
            return {"scaling_fwd": [], "scaling_bwd": []}
        return {"scaling_fwd": [*kept["forward"], None], "scaling_bwd": [*kept["backward"], None]}

    @property
    def fp8(self) -> bool:
        """Whether the last forward pass was quantised."""
        return any(quantizer is not None for quantizer in self.quantizers["scaling_fwd"])

    @property
    def fp8_meta(self) -> dict[str, Any]:
        metas = getattr(self.operation, "_fp8_metas", None)
        return {**metas["forward"], **metas["backward"]} if metas is not None else {}

    @property
    def activation_dtype(self) -> Any:
        return self.module.weight.dtype

    @property
    def _fp8_workspaces(self) -> dict[str, Any]:
        return {}  # an operation quantises its weight in every forward pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def fused_linears(modules: Iterable[NamedModule]) -> dict[int, FusedLinear]:
    """What to read instead of a linear module of a model, by the id of the module."""
    found = {}
    for named in modules:
        if is_fused_mlp(named.module):
            for name in _LINEARS:
                linear = getattr(named.module, name)
                found[id(linear)] = FusedLinear(named.module, linear)
    return found


def is_fused_mlp(module: object) -> bool:
    """Whether this is Megatron's MLP of operations."""
    return derives_from(module, "megatron", "TEFusedMLP")


def recipe_states(mlp: Any) -> Iterator[dict[str, Any]]:
    """What the operations of a fused MLP keep as modules keep their `fp8_meta`, one a direction."""
    for operation in _operations(mlp):
        metas = getattr(operation, "_fp8_metas", None) or {}
        yield from (meta for meta in metas.values() if meta is not None)


def forget_operations(mlp: Any) -> None:
    """Let the next forward pass make the operations of a fused MLP anew, without quantizers and histories."""
    mlp._fused_impl = None


def _operations(mlp: Any) -> Iterator[Any]:
    for sequence in mlp._fused_impl or ():
        yield from sequence
