"""Weights that stay quantised over the step: parameters, or the copies kept for its micro-batches.

What writes them is not the moment to read them: a parameter is written by the optimizer, for the next step,
and a copy mostly by a call that was handed the tensor to write to. So they are looked for in the modules:
parameters before the optimizer can have run, copies at the end of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from nemo_fp8_recipes.telemetry.linears import Linear, Operand
from nemo_fp8_recipes.telemetry.probes import Probe
from nemo_fp8_recipes.telemetry.seam import quantized_kinds
from nemo_fp8_recipes.telemetry.shares import Share, shares

if TYPE_CHECKING:
    from torch import nn

__all__ = ["KeptWeights", "MainCopies", "MainCopy"]


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


class MainCopy(NamedTuple):
    """What some or all elements of a quantised parameter were made of.

    Attributes:
        values: of any floating dtype, (elements,).
        first: which element of the parameter, counted row by row, the first one is.
        group: which ranks have the others, see `Share`; None where all are here.
        sharded: the optimizer shares the copies of parameters among ranks, whether it cut this one or not.
    """

    values: torch.Tensor
    first: int = 0
    group: int | None = None
    sharded: bool = True


class MainCopies:
    """The optimizer's own copies of quantised parameters, which Megatron keeps at the parameters and which
    have not changed since the parameters were written from them.

    Args:
        model: the model, wrapped or not, or Megatron's list of virtual-pipeline chunks.
    """

    def __init__(self, model: nn.Module | Sequence[nn.Module]) -> None:
        self._model = model
        self._shares: dict[int, tuple[Any, Share]] | None = None
        """By the id of the parameter, which is kept so that it stays its own."""

    def of(self, weight: Any) -> MainCopy | None:
        """What this rank has of the copy; None where that is nothing, or nobody knows which elements."""
        source = getattr(weight, "main_param", None)
        if not isinstance(source, torch.Tensor) or not _is_there(source, weight):
            return None
        source = source.detach().reshape(-1)
        whole = source.numel() == weight.numel()
        share = None if whole else self._share(weight)
        if not whole and (share is None or share.last - share.first != source.numel()):
            return None
        if share is None and not getattr(weight, "main_param_sharded", False):
            return MainCopy(source, sharded=False)
        # The distributed optimizer casts through the parameter's own dtype (`core/fp8_utils.py`).
        source = source.to(weight.dtype)
        return MainCopy(source) if share is None else MainCopy(source, share.first, share.group)

    def _share(self, weight: Any) -> Share | None:
        if self._shares is None:
            self._shares = {id(parameter): (parameter, share) for parameter, share in shares(self._model)}
        known = self._shares.get(id(weight))
        return known[1] if known is not None else None


def _is_there(source: torch.Tensor, weight: Any) -> bool:
    """Whether the values of `source` lie where those of the weight do: they may be kept elsewhere between
    optimizer steps, or their storage be given away.
    """
    held = source.untyped_storage().nbytes()
    return 0 < source.numel() * source.element_size() <= held and source.device == weight.device
