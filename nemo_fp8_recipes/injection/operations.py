"""Linear layers that run as operations of Transformer Engine (`transformer_engine.pytorch.ops`).

An operation keeps its quantizers in places of its own (`ops/op.py`), without those that a module has for its
output and its grad_input: two a GEMM in the forward direction, one in the backward one. It stands in the
module tree as part of a `te.ops.Sequential` or `te.ops.Linear`, or outside it: with
`use_transformer_engine_op_fuser` Megatron makes its MLP of a `TEFusedMLP`, and from 0.19 on that of experts
of a `TEGroupedMLP`, whose linear_fc1 and linear_fc2 are there for their parameters and names alone. The
operations that run are made of them in the first forward pass
(`megatron/core/extensions/transformer_engine.py`, `megatron/core/transformer/moe/experts.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from nemo_fp8_recipes.injection.module_names import NamedModule
from nemo_fp8_recipes.injection.peers import derives_from

__all__ = [
    "OperationLinear",
    "forget_quantizers",
    "is_linear",
    "keeps_weight_quantized",
    "linear_path",
    "operation_linears",
    "recipe_states",
]

_LINEARS = ("linear_fc1", "linear_fc2")
_INSIDE_LINEAR = re.compile(r"(^|\.)basic_ops\.\d+$")


class OperationLinear:
    """The operation of a linear layer, read like a module of Transformer Engine.

    Args:
        module: the operation, or the module that holds its weight and is not run.
    """

    def __init__(self, module: Any) -> None:
        self.module = module

    @property
    def operation(self) -> Any | None:
        """What multiplies with the weight; None where that was not made yet."""
        return self.module

    @property
    def num_gemms(self) -> int:
        """How many GEMMs it runs: one for each of the experts of a grouped one."""
        groups = getattr(self.operation, "num_groups", None)
        return int(getattr(self.module, "num_gemms", 1) if groups is None else groups)

    @property
    def forwarded_at_least_once(self) -> bool:
        """Whether it is known to have run: an operation remembers it by its quantizers alone."""
        return self.fp8

    @property
    def quantizers(self) -> dict[str, list[Any]]:
        kept = getattr(self.operation, "_quantizers", None)
        if kept is None:
            return {"scaling_fwd": [], "scaling_bwd": []}
        inputs, weights = kept["forward"][0::2], kept["forward"][1::2]
        forward = [slot for pair in zip(inputs, weights, strict=True) for slot in (*pair, None)]
        backward = [slot for quantizer in kept["backward"] for slot in (quantizer, None)]
        return {"scaling_fwd": forward, "scaling_bwd": backward}

    @property
    def slots_per_gemm(self) -> tuple[int, int]:
        """Columns that a GEMM has in the buffers of delayed scaling, forward and backward."""
        return 2, 1

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
        return next(self.module.parameters()).dtype

    @property
    def _fp8_workspaces(self) -> dict[str, Any]:
        return {}  # an operation quantises its weight in every forward pass

    def __getattr__(self, name: str) -> Any:
        if name == "module":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.module, name)


class _FusedLinear(OperationLinear):
    """A linear layer of one of Megatron's MLPs of operations."""

    def __init__(self, mlp: Any, module: Any) -> None:
        super().__init__(module)
        self._mlp = mlp

    @property
    def operation(self) -> Any | None:
        own = {id(parameter) for parameter in self.module.parameters(recurse=False)}
        for operation in _fused(self._mlp):
            if is_linear(operation) and any(id(weight) in own for weight in _weights(operation)):
                return operation
        return None

    @property
    def forwarded_at_least_once(self) -> bool:
        return self.operation is not None


def operation_linears(modules: Iterable[NamedModule]) -> dict[int, OperationLinear]:
    """What to read instead of a module, by the id of the module: a linear operation, or a linear layer in
    whose place one runs.
    """
    found: dict[int, OperationLinear] = {}
    for named in modules:
        if is_linear(named.module):
            found[id(named.module)] = OperationLinear(named.module)
        elif _is_fused_mlp(named.module):
            for name in _LINEARS:
                linear = getattr(named.module, name)
                found[id(linear)] = _FusedLinear(named.module, linear)
    return found


def is_linear(module: object) -> bool:
    """Whether this is an operation that multiplies with a weight, or with several."""
    return _is_operation(module) and derives_from(
        module, "transformer_engine", "BasicLinear", "GroupedLinear"
    )


def keeps_weight_quantized(module: object) -> bool:
    """Whether this is a linear operation whose parameters are stored quantised."""
    return is_linear(module) and any(
        derives_from(weight, "transformer_engine", "QuantizedTensor")
        or (
            derives_from(weight, "transformer_engine", "GroupedTensor")
            and getattr(weight, "quantizer", None) is not None
        )
        for weight in _weights(module)
    )


def _weights(operation: Any) -> Iterator[Any]:
    """The weights of a linear operation: one, or one for each group."""
    parameters = operation._parameters
    names = ("weight", *(f"weight{group}" for group in range(getattr(operation, "num_groups", 0))))
    yield from (weight for name in names if (weight := parameters.get(name)) is not None)


def linear_path(path: str) -> str:
    """The path of a linear operation: that of the `te.ops.Linear` it is part of, or its own."""
    return _INSIDE_LINEAR.sub("", path)


def recipe_states(module: Any) -> Iterator[dict[str, Any]]:
    """What the operations that are or belong to `module` keep as modules keep their `fp8_meta`, one a
    direction. Nothing for a module of any other kind.
    """
    operations = _fused(module) if _is_fused_mlp(module) else (module,) if _is_operation(module) else ()
    for operation in operations:
        metas = getattr(operation, "_fp8_metas", None) or {}
        yield from (meta for meta in metas.values() if meta is not None)


def forget_quantizers(module: Any) -> None:
    """Let the next forward pass make the quantizers and histories of operations anew. Nothing happens to a
    module of any other kind.
    """
    if _is_fused_mlp(module):
        if hasattr(module, "_fused_impl"):
            module._fused_impl = None
        for sequence in getattr(module, "_fused_ops", None) or ():
            # Megatron has registered hooks of its own on these.
            for operation in (sequence, *sequence):
                forget_quantizers(operation)
    elif derives_from(module, "transformer_engine", "Sequential"):
        # What runs them remembers the kind of recipe they were made ready for, and would not look again.
        module._module_groups = None
    elif _is_operation(module):
        module._fp8_metas = module._quantizers = None


def _is_fused_mlp(module: object) -> bool:
    return derives_from(module, "megatron", "TEFusedMLP") or (
        derives_from(module, "megatron", "TEGroupedMLP") and getattr(module, "_with_fused_impl", False)
    )


def _is_operation(module: object) -> bool:
    return derives_from(module, "transformer_engine", "BasicOperation")


def _fused(mlp: Any) -> Iterator[Any]:
    """The operations of one of Megatron's MLPs, once they are made."""
    for name in ("_fused_impl", "_fused_ops"):
        for sequence in getattr(mlp, name, None) or ():
            yield from sequence
