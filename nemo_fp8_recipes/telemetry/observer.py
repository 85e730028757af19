"""One logging step: what was quantised is handed to the probes, and the probes are read at its end."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from nemo_fp8_recipes.telemetry.linears import Operand, linears
from nemo_fp8_recipes.telemetry.probes import (
    BlockProbe,
    DelayedProbe,
    Nvfp4Probe,
    Probe,
    Reading,
    TensorwiseProbe,
)
from nemo_fp8_recipes.telemetry.probes.index import IndexCache
from nemo_fp8_recipes.telemetry.seam import QUANTISING, BindingSeam

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Observer"]


class Observer:
    """Sees every quantised operand of a model's linears between `begin` and `end`.

    Args:
        model: the model, wrapped or not, or Megatron's list of virtual-pipeline chunks.
        history: whether to read delayed scaling's windows.
    """

    def __init__(self, model: nn.Module | Sequence[nn.Module], *, history: bool) -> None:
        self._linears = linears(model)
        indices = IndexCache()
        self._delayed = DelayedProbe(self._linears, indices, history=history)
        self._by_quantizer: dict[str, Probe] = {
            "Float8CurrentScalingQuantizer": TensorwiseProbe(indices),
            "Float8BlockQuantizer": BlockProbe(indices, "blockwise"),
            "MXFP8Quantizer": BlockProbe(indices, "mxfp8"),
            "NVFP4Quantizer": Nvfp4Probe(indices),
        }
        self._operands: dict[int, tuple[Any, Operand]] = {}
        self._primary_read = False
        self._seam = BindingSeam(
            {
                **dict.fromkeys(QUANTISING, self._quantising),
                "fused_amax_and_scale_update_after_reduction": self._delayed.fused_update,
            },
            {"_amax_and_scale_update": self._delayed.unfused_update},
        )

    @property
    def probes(self) -> tuple[Probe, ...]:
        return (self._delayed, *self._by_quantizer.values())

    def begin(self) -> None:
        """A logging step starts."""
        for probe in self.probes:
            probe.begin()
        self._primary_read = False
        self._know_quantizers()
        self._seam.open()

    def end(self) -> Reading | None:
        """The step is over: everything it showed, or None. Call it before the next forward pass."""
        self._seam.close()
        if not self._primary_read:
            self._read_weights(primary=True)
        self._read_weights(primary=False)
        with torch.no_grad():
            readings = [reading for probe in self.probes if (reading := probe.end()) is not None]
        if not readings:
            return None
        return Reading(
            tuple(spec for reading in readings for spec in reading.specs),
            torch.cat([reading.values for reading in readings]),
        )

    def abandon(self) -> None:
        """Leave Transformer Engine as it was, whatever state the step is in."""
        self._seam.close()

    def _quantising(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Around a function of the binding that quantises."""

        def call(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            given = [*args, *kwargs.values()]
            # A tensor that is written again is a weight or a parameter, and is read where it is kept.
            if not any(_is(argument, "QuantizedTensorStorage") for argument in given):
                for quantizer, tensor in _made(given, result):
                    self._quantised(quantizer, tensor)
            return result

        return call

    def _quantised(self, quantizer: Any, tensor: Any) -> None:
        probe = self._by_quantizer.get(type(quantizer).__name__)
        if probe is None:
            return
        operand = self._operand(quantizer)
        if operand is None:
            return
        if operand.tensor == "grad_output" and not self._primary_read:
            # The first backward pass: every forward pass has begun on this rank, and the optimizer, which
            # writes quantised parameters anew, has not run.
            self._read_weights(primary=True)
        probe.quantised(operand, quantizer, tensor)

    def _operand(self, quantizer: Any) -> Operand | None:
        """Whose quantizer this is; None for one that is not of a linear of this model, such as the copy that
        every quantised tensor carries.
        """
        known = self._operands.get(id(quantizer))
        if known is None or known[0] is not quantizer:
            # Quantizers appear in a module's first forward, and change with the recipe.
            self._know_quantizers()
            known = self._operands.get(id(quantizer))
        return known[1] if known is not None and known[0] is quantizer else None

    def _know_quantizers(self) -> None:
        self._operands = {
            id(quantizer): (quantizer, Operand(linear.path, tensor))
            for linear in self._linears
            for tensor, quantizer in linear.quantizers()
        }

    def _read_weights(self, *, primary: bool) -> None:
        """Weights that stay quantised over the step: parameters, or the copies kept for its micro-batches."""
        found = False
        for linear in self._linears:
            if not linear.module.fp8 or linear.primary is not primary:
                continue
            weight = linear.weight()
            quantizer = getattr(weight, "_quantizer", None)
            probe = self._by_quantizer.get(type(quantizer).__name__)
            if probe is not None:
                probe.quantised(Operand(linear.path, "weight"), quantizer, weight)
                found = True
        if primary:
            self._primary_read = True
            if found:
                for probe in self._by_quantizer.values():
                    probe.settle()


def _made(given: Sequence[Any], result: Any) -> list[tuple[Any, Any]]:
    """Pairs of quantizer and the tensor it made, from arguments and result of a binding function."""
    results = result if isinstance(result, (tuple, list)) else (result,)
    made = [item for item in results if _is(item, "QuantizedTensorStorage")]
    if not made:
        return []
    for argument in given:
        if _is(argument, "Quantizer"):
            return [(argument, tensor) for tensor in made]
        if isinstance(argument, (list, tuple)) and any(_is(item, "Quantizer") for item in argument):
            return list(zip(argument, made, strict=False))
    return []


def _is(value: Any, name: str) -> bool:
    kind: Any = type(value)
    return _derives(kind, name)


@functools.lru_cache(maxsize=1024)
def _derives(kind: Hashable, name: str) -> bool:
    return any(
        base.__name__ == name and base.__module__.startswith("transformer_engine")
        for base in getattr(kind, "__mro__", ())
    )
