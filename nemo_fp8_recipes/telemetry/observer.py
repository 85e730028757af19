"""One logging step: what was quantised is handed to the probes, and the probes are read at its end."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from nemo_fp8_recipes.injection.operands import recipe_of
from nemo_fp8_recipes.telemetry.groups import OneMatrix, is_grouped, one_matrix
from nemo_fp8_recipes.telemetry.linears import Linear, Operand, linears
from nemo_fp8_recipes.telemetry.owners import Owned, Owners
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
from nemo_fp8_recipes.telemetry.probes.index import IndexCache
from nemo_fp8_recipes.telemetry.seam import (
    QUANTISING,
    Asking,
    BindingSeam,
    is_quantized,
    is_quantizer,
    quantized_kinds,
)
from nemo_fp8_recipes.telemetry.series import TENSORS
from nemo_fp8_recipes.telemetry.sources import sources
from nemo_fp8_recipes.telemetry.unseen import Unseen
from nemo_fp8_recipes.telemetry.weights import KeptWeights, MainCopies
from nemo_fp8_recipes.telemetry.whatif import WhatIf

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Observer"]


class _Made(NamedTuple):
    """One quantised operand that a call of the binding made."""

    owned: Owned
    operand: Operand
    quantizer: Any
    tensor: Any


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
        self._linears = linears(model)
        self._of_module: dict[int, list[Linear]] = {}
        for linear in self._linears:
            self._of_module.setdefault(id(linear.module), []).append(linear)
        indices = IndexCache()
        self._delayed = DelayedProbe(self._linears, indices, history=history)
        by_quantizer: dict[str, Probe] = {
            "Float8CurrentScalingQuantizer": TensorwiseProbe(indices),
            "Float8BlockQuantizer": BlockProbe(indices, "blockwise"),
            "MXFP8Quantizer": BlockProbe(indices, "mxfp8"),
            "NVFP4Quantizer": Nvfp4Probe(indices),
        }
        self._elements = ElementProbe(indices)
        members = Counter(linear.whole for linear in self._linears)
        self.whatif = WhatIf(whatif, indices, rank=rank, ranks=ranks, members=members)
        self._probes: tuple[Probe, ...] = (self._delayed, *by_quantizer.values())
        self._owners = Owners(by_quantizer)
        self._weights = KeptWeights(by_quantizer, self._reread_parameter)
        self._main_copies = MainCopies(model)
        self._unseen = Unseen(model)
        self._written: dict[int, tuple[Any, Owned]] = {}
        """id of a weight's copy -> it, and whose it is: known where the tensors themselves are read."""
        self._measured: set[Operand] = set()
        self._step = 0
        self._open = False
        self._stats = False
        self._joined: dict[bool, tuple[tuple[tuple[ReadingSpec, ...], ...], tuple[ReadingSpec, ...]]] = {}
        """What the readings were of in the last step of each kind, apart and one after the other: mostly the
        same tuple again.
        """
        self._seam = BindingSeam(
            {
                **{name: Asking(functools.partial(self._quantising, name)) for name in QUANTISING},
                "fused_amax_and_scale_update_after_reduction": self._delayed.fused_update,
            },
            {"_amax_and_scale_update": self._delayed.unfused_update},
        )

    def chosen_modules(self) -> set[str]:
        """The GEMMs on this rank, and modules of several, with an operand that is judged under the other
        recipes.
        """
        return {
            path
            for linear in self._linears
            for path in {linear.path, linear.whole}
            if any(self.whatif.wants(Operand(path, tensor)) for tensor in TENSORS)
        }

    def begin(self, *, stats: bool = False) -> None:
        """A logging step starts.

        Args:
            stats: whether to read the tensors themselves in it, beside what Transformer Engine computed.
        """
        self._step += 1
        self._stats = stats
        self._measured = set()
        if self._open:  # the last step did not end: what was seen of it goes
            for probe in self._probes:
                probe.begin()
        self._open = True
        self._weights.begin()
        if self._reads_tensors:
            self._elements.begin()
            self._know_copies()
        self._seam.open()

    def end(self) -> Reading | None:
        """The step is over: everything it showed, or None. Call it before the next forward pass."""
        self._seam.close()
        self._weights.read_parameters(self._linears)
        self._weights.read_copies()
        self._written = {}
        with torch.no_grad():
            ends = [*(probe.end for probe in self._probes)]
            if self._reads_tensors:
                ends += [self._elements.end, self.whatif.end]
            readings = [reading for end in ends if (reading := end()) is not None]
            unseen = self._unseen.reading(self._linears, self._owners, self._step, readings)
            if unseen is not None:
                readings.append(unseen)
        self._open = False
        if not readings:
            return None
        parts = tuple(reading.specs for reading in readings)
        joined = self._joined.get(self._stats)
        if joined is None or joined[0] != parts:
            joined = self._joined[self._stats] = (parts, tuple(spec for part in parts for spec in part))
        if len(readings) == 1:
            return Reading(joined[1], readings[0].values)
        return Reading(joined[1], torch.cat([reading.values for reading in readings]))

    def abandon(self) -> None:
        """Leave Transformer Engine as it was, whatever state the step is in."""
        self._seam.close()

    @property
    def _reads_tensors(self) -> bool:
        """Whether the tensors themselves are read in this step, of some operands at least."""
        return self._stats or bool(self.whatif.chosen)

    def _quantising(
        self, name: str, original: Callable[..., Any], idle: Callable[[], bool] = lambda: False
    ) -> Callable[..., Any]:
        """Around the function `name` of the binding, which quantises.

        Most calls make one tensor, with a quantizer that is known and stands where it stood the last time, in
        a step that does not read the tensors. For these `call` does as little as it can: it runs between
        Transformer Engine's kernels, where all that it touches is out of the caches.

        Args:
            idle: whether nothing is to be done, see `BindingSeam.idle`.
        """
        by_quantizer, strangers = self._owners.by_quantizer, self._owners.strangers
        chosen, kinds, weights = self.whatif.chosen, quantized_kinds, self._weights
        in_backward = torch._C._current_graph_task_id
        grouped = "group" in name
        place = 1

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal place
            if kwargs or self._stats or chosen:
                return original(*args, **kwargs) if idle() else self._followed(name, original, args, kwargs)
            quantizer = args[place] if place < len(args) else None
            owned = by_quantizer.get(id(quantizer))
            if owned is None:
                if id(quantizer) in strangers:
                    return original(*args)
                for where, quantizer in enumerate(args):
                    owned = by_quantizer.get(id(quantizer))
                    if owned is not None:
                        place = where
                        break
                    if id(quantizer) in strangers:
                        return original(*args)
                else:
                    return original(*args) if idle() else self._followed(name, original, args, kwargs)
            if idle():
                return original(*args)
            step = self._step
            if owned.gradient:
                if not weights.parameters_read:
                    weights.read_parameters(self._linears)
            elif not owned.module.training or (owned.seen == step and in_backward() != -1):
                return original(*args)
            take = owned.take
            if take is None and not grouped:  # delayed scaling, of which its buffers tell
                owned.seen = step
                return original(*args)
            result = original(*args)
            tensor, kind = result, type(result)
            if not kinds[kind]:
                made = [one for one in result if kinds[type(one)]] if kind is tuple or kind is list else ()
                if len(made) != 1:
                    self._take_in(args, result)
                    return result
                tensor = made[0]
            owned.seen = step
            if take is not None:
                for one in args:
                    if kinds[type(one)]:  # see `_take_in`
                        return result
                take(owned.operand, quantizer, tensor)
            return result

        return call

    def _followed(
        self, name: str, original: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """A call of any kind, and what follows from it."""
        result = original(*args, **kwargs)
        made = self._take_in((*args, *kwargs.values()), result)
        if self._reads_tensors and any(one is not None and self._is_reread(one.operand) for one in made):
            found = sources(name, original, args, kwargs, len(made))
            for one, source in zip(made, found or (), strict=False):
                if one is not None and one.tensor is not None:
                    self._reread(one.operand, one.quantizer, one.tensor, source)
        return result

    def _take_in(self, given: Sequence[Any], result: Any) -> list[_Made | None]:
        """Hand over what a call made of the arguments `given`; None for what is of no linear, and for what
        does not count.
        """
        found = [
            (self._owner(quantizer, tensor), quantizer, tensor) for quantizer, tensor in _made(given, result)
        ]
        made = [
            self._named(owned, quantizer, tensor) if owned is not None and self._counts(owned) else None
            for owned, quantizer, tensor in found
        ]
        # A tensor that is written again is a weight or a parameter, and its scale is read where it is kept.
        again = bool(made) and any(map(is_quantized, given))
        for one in made:
            if one is None:
                continue
            if one.tensor is None:
                continue  # experts that are nothing that can be read as one
            one.owned.seen = self._step
            if one.owned.gradient:
                self._weights.read_parameters(self._linears)
            take = one.owned.take
            if take is None or again:
                continue
            take(one.operand, one.quantizer, one.tensor)
        return made

    def _named(self, owned: Owned, quantizer: Any, tensor: Any) -> _Made:
        """The operand by its name: that of all experts where it was made for all of them."""
        if not is_grouped(tensor):
            return _Made(owned, owned.operand, quantizer, tensor)
        whole = one_matrix(tensor, quantizer)
        if whole is not None:
            # Each expert has a quantizer of its own, of which the first one is used.
            for linear in self._of_module[id(owned.module)]:
                other = self._owners.of_linear.get(linear.path, {}).get(owned.operand.tensor)
                if other is not None:
                    other.seen = self._step
        return _Made(owned, Operand(owned.linear.whole, owned.operand.tensor), quantizer, whole)

    def _owner(self, quantizer: Any, tensor: Any) -> Owned | None:
        """Whose quantizer this is, or whose weight is written."""
        owned = self._owners.by_quantizer.get(id(quantizer))
        if owned is not None:
            return owned
        written = self._written.get(id(tensor))
        return written[1] if written is not None else self._owners.find(quantizer, self._linears)

    def _counts(self, owned: Owned) -> bool:
        """Whether this is the operand's own pass through a training step, no evaluation and no repetition."""
        if owned.gradient:
            return True
        in_backward = torch._C._current_graph_task_id() != -1
        return owned.module.training and not (in_backward and owned.seen == self._step)

    def _know_copies(self) -> None:
        """Whose copy of a weight is whose: it is written with a quantizer of its own."""
        self._owners.know(self._linears)
        self._written = {}
        for linear in self._linears:
            weight = linear.cached_weight()
            owned = self._owners.of_linear.get(linear.path, {}).get("weight")
            if weight is not None and owned is not None:
                self._written[id(weight)] = (weight, owned)

    def _is_reread(self, operand: Operand) -> bool:
        """Whether the tensor itself is read: a weight once a step, as it does not change within one."""
        if operand.tensor == "weight" and operand in self._measured:
            return False
        return self._stats or self.whatif.wants(operand)

    def _reread(self, operand: Operand, quantizer: Any, tensor: Any, source: torch.Tensor) -> None:
        if not self._is_reread(operand):
            return
        self._measured.add(operand)
        if self._stats:
            self._elements.quantised(operand, quantizer, tensor, source)
        if self.whatif.wants(operand):
            experts, used = None, None
            if isinstance(tensor, OneMatrix):
                experts, used = tensor.experts(), tensor.used_rows()
            self.whatif.quantised(
                operand, recipe_of(quantizer), source, judge=self._stats, experts=experts, used=used
            )

    def _reread_parameter(self, operand: Operand, quantizer: Any, weight: Any) -> None:
        if not (self._reads_tensors and self._is_reread(operand)):
            return
        copy = self._main_copies.of(weight)
        if copy is None:
            return
        self._measured.add(operand)
        if self._stats:
            self._elements.kept(operand, quantizer, weight, copy)
        if copy.group is None and self.whatif.wants(operand):
            source = copy.values.reshape(weight.shape)
            self.whatif.quantised(operand, recipe_of(quantizer), source, judge=self._stats)


def _made(given: Sequence[Any], result: Any) -> list[tuple[Any, Any]]:
    """Pairs of quantizer and the tensor it made, from arguments and result of a binding function."""
    if is_quantized(result) or is_grouped(result):
        made = [result]
    elif isinstance(result, (tuple, list)):
        made = [item for item in result if is_quantized(item) or is_grouped(item)]
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
