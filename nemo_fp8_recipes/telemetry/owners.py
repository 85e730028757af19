"""Whose operand a quantizer makes, and what of it was seen in the step.

Quantizers are known by identity. They appear in a module's first quantised forward pass and change with the
recipe, so an unknown one is looked for in the modules once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_fp8_recipes.telemetry.linears import Linear, Operand
from nemo_fp8_recipes.telemetry.probes import Probe

__all__ = ["Owned", "Owners"]

_MAX_STRANGERS = 1 << 14
"""Quantizers of no linear that are remembered as such: mostly the copies that cached weights carry."""


@dataclass(slots=True, eq=False)
class Owned:
    """An operand of a linear. All that a call which quantises it asks for stands here: the call runs between
    Transformer Engine's kernels, where whatever it touches is out of the caches.

    Attributes:
        quantizer: makes it; kept, so that its id stays its own.
        linear: whose operand it is.
        operand: its names.
        module: the module of the linear.
        gradient: it is a grad_output.
        take: the probe's `quantised`; None where nothing is read of what such a quantizer makes.
        seen: last step in which it was quantised.
    """

    quantizer: Any
    linear: Linear
    operand: Operand
    module: Any
    gradient: bool
    take: Callable[[Operand, Any, Any], bool] | None
    seen: int = -1


class Owners:
    """Operands by their quantizers.

    Args:
        probes: probe by the name of a quantizer's class.

    Attributes:
        by_quantizer: id of a quantizer -> its operand. Always the same mapping.
        of_linear: path of a linear -> its operands, by tensor.
        strangers: id -> quantizer of no linear: such as the copy of its quantizer that every quantised tensor
            carries.
    """

    def __init__(self, probes: Mapping[str, Probe]) -> None:
        self._probes = probes
        self.by_quantizer: dict[int, Owned] = {}
        self.of_linear: dict[str, dict[str, Owned]] = {}
        self._lists: list[list[Any]] = []
        """The quantizers of the modules when `by_quantizer` was made of them."""
        self.strangers: dict[int, Any] = {}

    def know(self, linears: Sequence[Linear]) -> None:
        """Look for the quantizers that the modules have now. What was seen of their operands stays."""
        lists = []
        for linear in linears:
            quantizers = linear.module.quantizers
            lists += [quantizers["scaling_fwd"], quantizers["scaling_bwd"]]
        if lists == self._lists:
            return
        self._lists = [list(quantizers) for quantizers in lists]
        earlier = {owned.operand: owned for those in self.of_linear.values() for owned in those.values()}
        self.of_linear = {
            linear.path: {
                tensor: self._owned(linear, tensor, quantizer, earlier)
                for tensor, quantizer in linear.quantizers()
                if quantizer is not None
            }
            for linear in linears
        }
        self.by_quantizer.clear()
        self.by_quantizer.update(
            (id(owned.quantizer), owned) for those in self.of_linear.values() for owned in those.values()
        )

    def _owned(self, linear: Linear, tensor: str, quantizer: Any, earlier: Mapping[Operand, Owned]) -> Owned:
        operand = Operand(linear.path, tensor)
        probe = self._probes.get(type(quantizer).__name__)
        owned = Owned(
            quantizer,
            linear,
            operand,
            linear.module,
            tensor == "grad_output",
            probe.quantised if probe is not None else None,
        )
        if operand in earlier:
            owned.seen = earlier[operand].seen
        return owned

    def find(self, quantizer: Any, linears: Sequence[Linear]) -> Owned | None:
        """Whose quantizer this is; None for a stranger."""
        owned = self.by_quantizer.get(id(quantizer))
        if owned is None and id(quantizer) not in self.strangers:
            self.know(linears)
            owned = self.by_quantizer.get(id(quantizer))
            if owned is None:
                if len(self.strangers) >= _MAX_STRANGERS:
                    self.strangers.clear()
                self.strangers[id(quantizer)] = quantizer
        return owned
