"""The quantised GEMMs of a model and who makes their operands.

Transformer Engine gives each GEMM of a module its own quantizers, three in the forward direction (input,
weight, output) and two in the backward one (grad_output, grad_input), in `module.quantizers`; delayed scaling
keeps scale and history of the same slots in `module.fp8_meta` (`transformer_engine/pytorch/module/base.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from nemo_fp8_recipes.injection.module_names import named_modules
from nemo_fp8_recipes.injection.operations import linear_path, operation_linears
from nemo_fp8_recipes.injection.peers import derives_from

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Linear", "Operand", "linears"]

_FORWARD_SLOTS = {"input": 0, "weight": 1}
_FORWARD_SIZE = 3
_BACKWARD_SIZE = 2


class Operand(NamedTuple):
    """One operand of one GEMM: a row of the telemetry.

    Attributes:
        module: name of the GEMM, see `Linear.path`.
        tensor: "input", "weight" or "grad_output".
    """

    module: str
    tensor: str


@dataclass(frozen=True)
class Linear:
    """One GEMM of a Transformer Engine module.

    Attributes:
        path: module path in the whole model; `<path>.gemm<i>` for module with several GEMMs, where i counts
            experts over the expert-parallel ranks.
        module: the Transformer Engine module, or what is read instead of it (`injection/operations.py`).
        gemm: index of the GEMM within the module on this rank.
        whole: path of the module: what is quantised for all its GEMMs at once goes by it.
    """

    path: str
    module: Any
    gemm: int
    whole: str = ""

    def quantizers(self) -> Iterator[tuple[str, Any]]:
        """Operand and the quantizer that makes it; nothing before the module's first quantised forward."""
        forward = self.module.quantizers["scaling_fwd"]
        if len(forward) >= (self.gemm + 1) * _FORWARD_SIZE:
            for tensor, slot in _FORWARD_SLOTS.items():
                yield tensor, forward[self.gemm * _FORWARD_SIZE + slot]
        backward = self.module.quantizers["scaling_bwd"]
        if len(backward) >= (self.gemm + 1) * _BACKWARD_SIZE:
            yield "grad_output", backward[self.gemm * _BACKWARD_SIZE]

    def scale_columns(self) -> Iterator[tuple[str, Any, int]]:
        """Operand, the `scale` tensor of delayed scaling that holds its slot, and the column in it."""
        ahead, back = getattr(self.module, "slots_per_gemm", (_FORWARD_SIZE, _BACKWARD_SIZE))
        forward = getattr(self.module.fp8_meta.get("scaling_fwd"), "scale", None)
        if forward is not None:
            for tensor, slot in _FORWARD_SLOTS.items():
                yield tensor, forward, self.gemm * ahead + slot
        backward = getattr(self.module.fp8_meta.get("scaling_bwd"), "scale", None)
        if backward is not None:
            yield "grad_output", backward, self.gemm * back

    def parameter(self) -> Any | None:
        """The weight as the module's parameter, quantised or not; None where it is made of several, or kept
        elsewhere.
        """
        # Not by getattr, which for a module's parameters fails first, and for its absent ones twice.
        return self._parameters.get(self._weight_name)

    def cached_weight(self) -> Any | None:
        """The quantised copy of the weight that the module keeps for the micro-batches of a step, or None: a
        module may quantise it in every forward.
        """
        copies = self.module._fp8_workspaces
        copy = copies.get(self._weight_name)
        if copy is None and copies:
            copy = next((copies[name] for name in self._weight_names if name in copies), None)
        return copy

    @functools.cached_property
    def _weight_names(self) -> tuple[str, ...]:
        return f"fc{self.gemm + 1}_weight", f"weight{self.gemm}", "weight"

    @functools.cached_property
    def _parameters(self) -> Mapping[str, Any]:
        """Where the weight is: among the module's parameters or, for instance as a view of them, its
        attributes.
        """
        parameters = self.module._parameters
        if not any(parameters.get(name) is not None for name in self._weight_names):
            return vars(self.module)
        return parameters

    @functools.cached_property
    def _weight_name(self) -> str:
        names = self._weight_names
        return next((name for name in names if self._parameters.get(name) is not None), names[-1])

    @functools.cached_property
    def weight_operand(self) -> Operand:
        return Operand(self.path, "weight")


def linears(model: nn.Module | Sequence[nn.Module]) -> tuple[Linear, ...]:
    """The GEMMs of every Transformer Engine linear of a model (or of Megatron's list of chunks).

    Linears that run in high precision are among them; they just never show a quantised operand.
    """
    found: list[Linear] = []
    modules = tuple(named_modules(model))
    operations = operation_linears(modules)
    for named in modules:
        module: Any = named.module
        operation = operations.get(id(module))
        if operation is not None:
            found += _gemms_of(linear_path(named.path), operation, operation.num_gemms)
            continue
        if not derives_from(module, "transformer_engine", "TransformerEngineBaseModule"):
            continue
        if derives_from(module, "transformer_engine", "DotProductAttention"):
            continue
        found += _gemms_of(named.path, module, int(module.fp8_meta.get("num_gemms") or _gemms(module)))
    return tuple(found)


def _gemms_of(path: str, module: Any, gemms: int) -> Iterator[Linear]:
    offset = _expert_offset(path, gemms)
    for gemm in range(gemms):
        yield Linear(path if gemms == 1 else f"{path}.gemm{offset + gemm}", module, gemm, path)


def _gemms(module: Any) -> int:
    """GEMMs of a module; `fp8_meta["num_gemms"]` exists only after the first quantised forward."""
    if derives_from(module, "transformer_engine", "LayerNormMLP"):
        return 2
    return int(getattr(module, "num_gemms", 1))


def _expert_offset(path: str, gemms: int) -> int:
    """How many experts the lower expert-parallel ranks hold: makes the number of an expert global."""
    if ".experts." not in f".{path}.":
        return 0
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return 0
    return int(parallel_state.get_expert_model_parallel_rank()) * gemms
