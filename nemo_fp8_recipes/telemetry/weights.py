"""Weights that stay quantised over the step: parameters, or the copies kept for its micro-batches.

What writes them is not the moment to read them: a parameter is written by the optimizer, for the next step,
and a copy mostly by a call that was handed the tensor to write to. So they are looked for in the modules:
parameters before the optimizer can have run, copies at the end of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from nemo_fp8_recipes.telemetry.linears import Linear, Operand
from nemo_fp8_recipes.telemetry.probes import Probe
from nemo_fp8_recipes.telemetry.seam import quantized_kinds

__all__ = ["KeptWeights", "main_copy"]


class KeptWeights:
    """Hands the quantised weights of a step to the probes.

    Args:
        probes: probe by the name of a quantizer's class.
        reread: called with operand, quantizer and weight of each quantised parameter before it is handed
            over.

    Attributes:
        parameters_read: the quantised parameters were read in this step.
    """

    def __init__(self, probes: Mapping[str, Probe], reread: Callable[[Operand, Any, Any], None]) -> None:
        self._probes = probes
        self._reread = reread
        self.begin()

    def begin(self) -> None:
        """A logging step starts."""
        self.parameters_read = False
        self._others: list[Linear] = []

    def read_parameters(self, linears: Sequence[Linear]) -> None:
        """Read the quantised parameters: in the first backward pass, when every forward pass has begun on
        this rank, and the optimizer, which writes them anew, has not run. Once a step.
        """
        if self.parameters_read:
            return
        self.parameters_read = True
        found = False
        for linear in linears:
            if not linear.module.fp8:
                continue
            weight = linear.parameter()
            if not quantized_kinds[type(weight)]:
                self._others.append(linear)
                continue
            quantizer = getattr(weight, "_quantizer", None)
            if quantizer is not None:
                self._reread(linear.weight_operand, quantizer, weight)
            found |= self._hand_over(linear, quantizer, weight)
        if found:
            for probe in self._probes.values():
                probe.settle()

    def read_copies(self) -> None:
        """Read the copies of the other weights, at the end of the step."""
        for linear in self._others:
            if not linear.module._fp8_workspaces:
                continue
            weight = linear.cached_weight()
            if weight is not None:
                self._hand_over(linear, getattr(weight, "_quantizer", None), weight)

    def _hand_over(self, linear: Linear, quantizer: Any, weight: Any) -> bool:
        probe = self._probes.get(type(quantizer).__name__)
        if probe is None:
            return False
        probe.quantised(linear.weight_operand, quantizer, weight)
        return True


def main_copy(weight: Any) -> torch.Tensor | None:
    """What a quantised parameter was made of: the optimizer's own copy, which Megatron keeps at the parameter
    and which has not changed since. None where there is none, or only a shard of it.
    """
    source = getattr(weight, "main_param", None)
    if not isinstance(source, torch.Tensor) or source.numel() != weight.numel():
        return None
    source = source.detach().reshape(weight.shape)
    # The distributed optimizer casts through the parameter's own dtype (`core/fp8_utils.py`).
    return source.to(weight.dtype) if getattr(weight, "main_param_sharded", False) else source
