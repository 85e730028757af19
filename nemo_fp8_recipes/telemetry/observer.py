"""One logging step: what was quantised is handed to the probes, and the probes are read at its end."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from nemo_fp8_recipes.injection.cuda_graphs import graphed_modules
from nemo_fp8_recipes.injection.operands import recipe_of
from nemo_fp8_recipes.telemetry.linears import Linear, Operand, linears
from nemo_fp8_recipes.telemetry.probes import (
    BlockProbe,
    DelayedProbe,
    ElementProbe,
    Nvfp4Probe,
    Probe,
    Reading,
    ReadingSpec,
    TensorwiseProbe,
)
from nemo_fp8_recipes.telemetry.probes.base import element_format
from nemo_fp8_recipes.telemetry.probes.index import IndexCache
from nemo_fp8_recipes.telemetry.seam import (
    QUANTISING,
    BindingSeam,
    is_quantized,
    is_quantizer,
    quantized_type,
)
from nemo_fp8_recipes.telemetry.series import TENSORS
from nemo_fp8_recipes.telemetry.sources import sources
from nemo_fp8_recipes.telemetry.whatif import WhatIf

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Observer"]

_MAX_STRANGERS = 1 << 14
"""Quantizers of no linear that are remembered as such: mostly the copies that cached weights carry."""


class _Known(NamedTuple):
    """An object of Transformer Engine, kept so that its id stays its own, and whose it is; of a quantizer
    also who reads what it makes, and whether that is a gradient.
    """

    kept: Any
    linear: Linear
    operand: Operand
    probe: Probe | None = None
    gradient: bool = False


class _Made(NamedTuple):
    """One quantised operand that a call of the binding made."""

    operand: Operand
    quantizer: Any
    tensor: Any
    written_again: bool
    position: int


class Observer:
    """Sees every quantised operand of a model's linears between `begin` and `end`.

    A forward pass of a module in evaluation mode does not count, nor does one that is repeated in the
    backward pass (activation recompute).

    Args:
        model: the model, wrapped or not, or Megatron's list of virtual-pipeline chunks.
        history: whether to read delayed scaling's windows.
        whatif: globs over `<module>/<tensor>` of the operands to judge under the other recipes.
        rank, ranks: which rank of how many this is.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        *,
        history: bool,
        whatif: Sequence[str] = (),
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self._model = model
        self._linears = linears(model)
        indices = self._indices = IndexCache()
        self._delayed = DelayedProbe(self._linears, indices, history=history)
        self._by_quantizer: dict[str, Probe] = {
            "Float8CurrentScalingQuantizer": TensorwiseProbe(indices),
            "Float8BlockQuantizer": BlockProbe(indices, "blockwise"),
            "MXFP8Quantizer": BlockProbe(indices, "mxfp8"),
            "NVFP4Quantizer": Nvfp4Probe(indices),
        }
        self._elements = ElementProbe(indices)
        self.whatif = WhatIf(whatif, indices, rank=rank, ranks=ranks)
        self._operands: dict[int, _Known] = {}
        self._weights: dict[int, _Known] = {}
        self._quantizers: list[list[Any]] = []
        """Those of the modules when `_operands` was made of them."""
        self._strangers: dict[int, Any] = {}
        self._seen: set[Operand] = set()
        self._measured: set[Operand] = set()
        self._primary_read = False
        self._weight_owners: dict[bool, list[Linear]] = {}
        """The linears that are quantised in this step, by whether their parameter itself is."""
        self._stats = False
        self._graphed: tuple[frozenset[int], frozenset[int]] | None = None
        """Modules of which nothing was seen when last there were any, and those of them that run as CUDA
        graphs.
        """
        self._joined: dict[bool, tuple[tuple[tuple[ReadingSpec, ...], ...], tuple[ReadingSpec, ...]]] = {}
        """What the readings were of in the last step of each kind, apart and one after the other: mostly the
        same tuple again.
        """
        self._seam = BindingSeam(
            {
                **{name: functools.partial(self._quantising, name) for name in QUANTISING},
                "fused_amax_and_scale_update_after_reduction": self._delayed.fused_update,
            },
            {"_amax_and_scale_update": self._delayed.unfused_update},
        )

    @property
    def probes(self) -> tuple[Probe, ...]:
        return (self._delayed, *self._by_quantizer.values())

    def chosen_modules(self) -> set[str]:
        """The GEMMs on this rank with an operand that is judged under the other recipes."""
        return {
            linear.path
            for linear in self._linears
            if any(self.whatif.wants(Operand(linear.path, tensor)) for tensor in TENSORS)
        }

    def begin(self, *, stats: bool = False) -> None:
        """A logging step starts.

        Args:
            stats: whether to read the tensors themselves in it, beside what Transformer Engine computed.
        """
        for probe in self.probes:
            probe.begin()
        self._elements.begin()
        self._stats = stats
        self._seen, self._measured = set(), set()
        if len(self._strangers) > _MAX_STRANGERS:
            self._strangers = {}
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
            ends = [
                *(probe.end for probe in self.probes),
                self._elements.end,
                self.whatif.end,
            ]
            readings = [reading for end in ends if (reading := end()) is not None]
            if (unseen := self._unseen(readings)) is not None:
                readings.append(unseen)
        if not readings:
            return None
        parts = tuple(reading.specs for reading in readings)
        joined = self._joined.get(self._stats)
        if joined is None or joined[0] != parts:
            joined = self._joined[self._stats] = (parts, tuple(spec for part in parts for spec in part))
        return Reading(joined[1], torch.cat([reading.values for reading in readings]))

    def abandon(self) -> None:
        """Leave Transformer Engine as it was, whatever state the step is in."""
        self._seam.close()

    def _quantising(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """Around the function `name` of the binding, which quantises."""

        def call(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            given = (*args, *kwargs.values()) if kwargs else args
            if not (self._stats or self.whatif.chosen) and self._quantised_one(given, result):
                return result
            pairs = _made(given, result)
            if not pairs:
                return result
            made = []
            for position, (quantizer, tensor) in enumerate(pairs):
                known = self._known(quantizer, tensor)
                if known is not None and self._counts(known):
                    # A tensor that is written again is a weight or a parameter, and its scale is read where
                    # it is kept.
                    again = any(map(is_quantized, given))
                    made.append(_Made(known.operand, quantizer, tensor, again, position))
            for one in made:
                self._quantised(one.operand, one.quantizer, one.tensor, written_again=one.written_again)
            if not (self._stats or self.whatif.chosen):
                return result
            reread = [one for one in made if self._is_reread(one.operand)]
            if reread:
                found = sources(name, original, args, kwargs, len(pairs))
                if found is not None:
                    for one in reread:
                        self._reread(one, found[one.position])
            return result

        return call

    def _quantised_one(self, given: Sequence[Any], result: Any) -> bool:
        """Take in a call that made one tensor with a quantizer that is known, as most do; False: the call is
        another one. It runs between Transformer Engine's kernels, where all that it touches is out of the
        caches: so it does as little as it can.
        """
        operands = self._operands
        for quantizer in given:
            known = operands.get(id(quantizer))
            if known is not None:
                break
        else:
            strangers = self._strangers
            for one in given:  # noqa: SIM110 - a generator takes longer than all of this
                if id(one) in strangers and strangers[id(one)] is one:
                    return True
            return False
        tensor = result
        if type(result) is tuple or type(result) is list:
            made = [item for item in result if quantized_type(type(item))]
            if len(made) != 1:
                return False
            tensor = made[0]
        elif not quantized_type(type(result)):
            return False
        operand = known.operand
        if not known.gradient and not (
            known.linear.module.training
            and (torch._C._current_graph_task_id() == -1 or operand not in self._seen)
        ):
            return True
        self._seen.add(operand)
        if known.probe is not None and not any(map(quantized_type, map(type, given))):
            if known.gradient and not self._primary_read:
                self._read_weights(primary=True)
            known.probe.quantised(operand, quantizer, tensor)
        return True

    def _counts(self, known: _Known) -> bool:
        """Whether this is the operand's own pass through a training step, no evaluation and no repetition."""
        if known.operand.tensor == "grad_output":
            return True
        if not known.linear.module.training:
            return False
        in_backward = torch._C._current_graph_task_id() != -1
        return not (in_backward and known.operand in self._seen)

    def _quantised(self, operand: Operand, quantizer: Any, tensor: Any, *, written_again: bool) -> None:
        self._seen.add(operand)
        probe = self._by_quantizer.get(type(quantizer).__name__)
        if probe is None or written_again:
            return
        if not self._primary_read and operand.tensor == "grad_output":
            # The first backward pass: every forward pass has begun on this rank, and the optimizer, which
            # writes quantised parameters anew, has not run.
            self._read_weights(primary=True)
        probe.quantised(operand, quantizer, tensor)

    def _is_reread(self, operand: Operand) -> bool:
        """Whether the tensor itself is read: a weight once a step, as it does not change within one."""
        if operand.tensor == "weight" and operand in self._measured:
            return False
        return self._stats or self.whatif.wants(operand)

    def _reread(self, made: _Made, source: torch.Tensor) -> None:
        self._measured.add(made.operand)
        if self._stats:
            self._elements.quantised(made.operand, made.quantizer, made.tensor, source)
        if self.whatif.wants(made.operand):
            self.whatif.quantised(made.operand, recipe_of(made.quantizer), source, judge=self._stats)

    def _known(self, quantizer: Any, tensor: Any) -> _Known | None:
        """Whose quantizer this is, or whose weight is written; None for what is of no linear of this model,
        such as the copy of its quantizer that every quantised tensor carries.
        """
        for table, key in ((self._operands, quantizer), (self._weights, tensor)):
            known = table.get(id(key))
            if known is not None and known.kept is key:
                return known
        if self._strangers.get(id(quantizer)) is quantizer:
            return None
        # Quantizers appear in a module's first forward, and change with the recipe.
        self._know_quantizers()
        known = self._operands.get(id(quantizer))
        if known is not None and known.kept is quantizer:
            return known
        self._strangers[id(quantizer)] = quantizer
        return None

    def _know_quantizers(self) -> None:
        lists = [
            quantizers
            for linear in self._linears
            for quantizers in (
                linear.module.quantizers["scaling_fwd"],
                linear.module.quantizers["scaling_bwd"],
            )
        ]
        if lists != self._quantizers:
            self._quantizers = [list(quantizers) for quantizers in lists]
            self._operands = {
                id(quantizer): _Known(
                    quantizer,
                    linear,
                    Operand(linear.path, tensor),
                    self._by_quantizer.get(type(quantizer).__name__),
                    tensor == "grad_output",
                )
                for linear in self._linears
                for tensor, quantizer in linear.quantizers()
                if quantizer is not None
            }
        # A quantised parameter is not among them: what the optimizer writes is the next step's weight.
        self._weights = {}
        if self._stats or self.whatif.chosen:
            self._weights = {
                id(weight): _Known(weight, linear, linear.weight_operand)
                for linear in self._linears
                if not linear.primary and (weight := linear.weight()) is not None
            }

    def _unseen(self, readings: Sequence[Reading]) -> Reading | None:
        """Marks of the modules whose quantising calls did not pass by in the step: what a replayed CUDA graph
        quantises passes no function that could be watched. `unobserved` are the operands of which nothing
        was read, and `graphed` all of a module that runs as a CUDA graph: of it there is what Transformer
        Engine keeps in its buffers (delayed scaling's state, cached weights) and nothing else.
        """
        seen = {operand.module for operand in self._seen}
        unseen = [
            (linear, dict(linear.quantizers()))
            for linear in self._linears
            if linear.path not in seen and linear.module.fp8 and linear.module.training
        ]
        if not unseen:
            return None
        read = {(spec.module, spec.tensor) for reading in readings for spec in reading.specs}
        modules = frozenset(id(linear.module) for linear, _ in unseen)
        if self._graphed is None or self._graphed[0] != modules:
            self._graphed = (modules, modules & graphed_modules(self._model).keys())
        specs = []
        for linear, quantizers in unseen:
            for tensor, quantizer in quantizers.items():
                if quantizer is None:
                    continue
                marks = ["graphed"] if id(linear.module) in self._graphed[1] else []
                marks += ["unobserved"] if (linear.path, tensor) not in read else []
                recipe, fmt = recipe_of(quantizer), element_format(quantizer)
                specs += [ReadingSpec(linear.path, tensor, mark, recipe, fmt, "max") for mark in marks]
        if not specs:
            return None
        device = next(unseen[0][0].module.parameters()).device
        return Reading(tuple(specs), torch.ones(len(specs), device=device))

    def _read_weights(self, *, primary: bool) -> None:
        """Weights that stay quantised over the step: parameters, or the copies kept for its micro-batches."""
        found = False
        if primary:
            # Nothing of it changes within a step.
            self._weight_owners = {True: [], False: []}
            for linear in self._linears:
                if linear.module.fp8:
                    self._weight_owners[linear.primary].append(linear)
        for linear in self._weight_owners[primary]:
            weight = linear.weight()
            quantizer = getattr(weight, "_quantizer", None)
            operand = linear.weight_operand
            if primary and quantizer is not None and self._is_reread(operand):
                self._reread_primary(_Made(operand, quantizer, weight, False, 0))
            probe = self._by_quantizer.get(type(quantizer).__name__)
            if probe is not None:
                probe.quantised(operand, quantizer, weight)
                found = True
        if primary:
            self._primary_read = True
            if found:
                for probe in self._by_quantizer.values():
                    probe.settle()

    def _reread_primary(self, made: _Made) -> None:
        """A quantised parameter was made of the optimizer's own copy, which Megatron keeps at the parameter
        and which has not changed since. Where the copy is a shard of it there is nothing to compare with.
        """
        source = getattr(made.tensor, "main_param", None)
        if isinstance(source, torch.Tensor) and source.numel() == made.tensor.numel():
            source = source.detach().reshape(made.tensor.shape)
            if getattr(made.tensor, "main_param_sharded", False):
                # The distributed optimizer casts through the parameter's own dtype (`core/fp8_utils.py`).
                source = source.to(made.tensor.dtype)
            self._reread(made, source)


def _made(given: Sequence[Any], result: Any) -> list[tuple[Any, Any]]:
    """Pairs of quantizer and the tensor it made, from arguments and result of a binding function."""
    if is_quantized(result):
        made = [result]
    elif isinstance(result, (tuple, list)):
        made = [item for item in result if is_quantized(item)]
    else:
        return []
    if not made:
        return []
    for argument in given:
        if is_quantizer(argument):
            return [(argument, tensor) for tensor in made]
        if isinstance(argument, (list, tuple)) and any(is_quantizer(item) for item in argument):
            return list(zip(argument, made, strict=False))
    return []
